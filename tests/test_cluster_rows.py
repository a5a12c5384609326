"""Rows of blocks in an order in which neighbours read the same columns; all that reads the channels follows."""

import copy
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxdbsr
from bench.random_nets import random_masks, random_net
from fxdbsr.channels.rows import clustered, union_share
from fxdbsr.layers import blocked_layers
from fxdbsr.passes import CONVERT, run
from fxdbsr.passes.cluster_rows import cluster_rows
from fxdbsr.passes.lowering import Lowering
from fxdbsr.passes.selection import CONV_TYPES
from fxdbsr.traced import TwoGraphModule

X = torch.randn(2, 8, 4, 4, dtype=torch.float64)
MIXED = [[1, 0], [0, 1], [1, 0], [0, 1]]
SORTED = ([[1, 0]] * 2 + [[0, 1]] * 2, [[0, 1]] * 2 + [[1, 0]] * 2)


def random_rows(rows: int, columns: int, seed: int) -> list[int]:
    random = Random(seed)
    return [sum(1 << c for c in random.sample(range(columns), columns // 2)) for _ in range(rows)]


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 16, 33])
def test_the_order_holds_every_row_once(rows: int) -> None:
    assert sorted(clustered(random_rows(rows, 8, 0))) == list(range(rows))


def test_rows_without_blocks_and_equal_rows_lie_together() -> None:
    masks = [0b11, 0, 0b11, 0b100, 0, 0b100]
    ordered = [masks[i] for i in clustered(masks)]
    assert all(a == b for a, b in zip(ordered[::2], ordered[1::2], strict=True))


@pytest.mark.parametrize("shape", [(16, 16), (32, 32), (64, 16), (32, 64)])
def test_the_union_of_two_random_rows_falls_from_three_quarters(shape: tuple[int, int]) -> None:
    before = after = 0.0
    for seed in range(5):
        masks = random_rows(*shape, seed)
        before += union_share(masks, range(len(masks)), 2, shape[1]) / 5
        after += union_share(masks, clustered(masks), 2, shape[1]) / 5
    assert 0.72 < before < 0.78
    assert 0.55 < after < 0.70


class Net(nn.Module):
    """Calls `run(self, x)` over the layers given."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(i: int, o: int, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, 1, **kwargs)


def ordered(net: nn.Module, masks: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """Which blocks the layers of `masks` hold after the pass; the outputs are held to be equal."""
    prepared = fxdbsr.prepare(net.double().eval(), 4, types=(*CONV_TYPES, nn.Linear))
    for layer in blocked_layers(prepared):
        if layer.name in masks:
            layer.set_mask(torch.tensor(masks[layer.name]).bool())
    graph = prepared.graph_module(False) if isinstance(prepared, TwoGraphModule) else prepared
    assert isinstance(graph, fx.GraphModule)
    after = copy.deepcopy(graph)
    run(CONVERT[: CONVERT.index(cluster_rows) + 1], after, Lowering("reference"))
    with torch.no_grad():
        torch.testing.assert_close(after(X), prepared(X), rtol=1e-12, atol=1e-12)
    layers: Any = {name: after.get_submodule(name) for name in masks}
    return {name: m.grid.nonzero(m.weight).int().tolist() for name, m in layers.items()}


def chain(m: Any, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x)))  # type: ignore[no-any-return]


MOVED = {
    "conv": Net(chain, a=conv(8, 16), b=conv(16, 3)),
    "transposed conv": Net(chain, a=conv(8, 16), b=nn.ConvTranspose2d(16, 3, 2)),
    "norm": Net(lambda m, x: m.b(F.relu(m.a(x)) - 1), a=nn.Sequential(conv(8, 16), nn.BatchNorm2d(16)), b=conv(16, 3)),
    "flatten": Net(lambda m, x: m.b(m.a(x).flatten(1)), a=conv(8, 16), b=nn.Linear(256, 3)),
    "flatten behind a channel that stands there twice": Net(
        lambda m, x: m.b(torch.cat([x[:, :1], x[:, :1], m.a(x)], 1).flatten(1)), a=conv(8, 16), b=nn.Linear(288, 3)
    ),
    "mean": Net(lambda m, x: m.b(m.a(x).mean((2, 3))), a=conv(8, 16), b=nn.Linear(16, 3)),
    "cat": Net(lambda m, x: m.b(torch.cat([m.c(x), m.a(x)], 1)), a=conv(8, 16), b=conv(24, 3), c=conv(8, 8)),
    "two readers": Net(lambda m, x: m.b(m.a(x)) + m.c(m.a(x)), a=conv(8, 16), b=conv(16, 3), c=conv(16, 3)),
    "shared": Net(lambda m, x: m.b(m.a(x)) + m.b(m.a(2 * x)), a=conv(8, 16), b=conv(16, 3)),
    "prelu": Net(lambda m, x: m.b(m.c(m.a(x))), a=conv(8, 16), c=nn.PReLU(16), b=conv(16, 3)),
}


@pytest.mark.parametrize("name", MOVED)
def test_rows_that_read_the_same_columns_lie_together_and_the_reader_follows(name: str) -> None:
    first = "a.0" if name == "norm" else "a"
    assert ordered(MOVED[name], {first: MIXED})[first] in SORTED


def test_convs_that_are_added_move_as_one() -> None:
    net = Net(lambda m, x: m.c(m.a(x) + m.b(x)), a=conv(8, 16), b=conv(8, 16), c=conv(16, 3))
    found = ordered(net, {"a": MIXED, "b": MIXED[::-1]})
    assert found["a"] in SORTED
    assert found["b"] == [[1 - flag for flag in row] for row in found["a"]]


SLICE = {"a": conv(8, 16), "b": conv(8, 3), "c": conv(16, 3), "d": nn.ReLU()}
STAYS = {
    "output": Net(lambda m, x: m.a(x), a=conv(8, 16)),
    "softmax": Net(lambda m, x: m.b(torch.softmax(m.a(x), 1)), a=conv(8, 16), b=conv(16, 3)),
    "group norm": Net(lambda m, x: m.b(m.c(m.a(x))), a=conv(8, 16), c=nn.GroupNorm(2, 16), b=conv(16, 3)),
    "grouped": Net(chain, a=conv(8, 16), b=conv(16, 4, groups=2)),
    "slice": Net(lambda m, x: m.b(m.d(m.a(x))[:, 2:10]) + m.c(m.a(x)), **SLICE),
    "flip": Net(lambda m, x: m.b(m.a(x).flip(1)), a=conv(8, 16), b=conv(16, 3)),
    "factor": Net(lambda m, x: m.b(m.a(x) * torch.arange(16.0).view(16, 1, 1)), a=conv(8, 16), b=conv(16, 3)),
    "added input": Net(lambda m, x: m.b(m.a(x) + torch.cat([x, x], 1)), a=conv(8, 16), b=conv(16, 3)),
    "offset": Net(lambda m, x: m.b(torch.cat([x[:, :2], m.a(x)], 1)), a=conv(8, 16), b=conv(18, 3)),
}


@pytest.mark.parametrize("name", STAYS)
def test_rows_stay_where_their_order_is_seen_or_blocks_would_be_cut(name: str) -> None:
    assert ordered(STAYS[name], {"a": MIXED})["a"] == MIXED


@torch.no_grad()
def test_random_nets_stay_equal_with_this_pass_alone() -> None:
    moved = 0
    for seed in range(60):
        net, x = random_net(seed)
        prepared = fxdbsr.prepare(net, Random(seed).choice((1, 2, 4)), types=(*CONV_TYPES, nn.Linear))
        random_masks(prepared, seed)
        traced = prepared.graph_module(False) if isinstance(prepared, TwoGraphModule) else prepared
        after = copy.deepcopy(traced)
        assert isinstance(after, fx.GraphModule)
        fold, cluster = CONVERT[1], cluster_rows
        run([fold], after, Lowering("reference"))
        weights = [p.clone() for p in after.parameters()]
        run([cluster], after, Lowering("reference"))
        moved += any(not torch.equal(a, b) for a, b in zip(weights, after.parameters(), strict=True))
        expected = prepared(x)
        assert (after(x) - expected).abs().max() <= 1e-9 * expected.abs().max(), seed
    assert moved > 10
