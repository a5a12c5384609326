"""Block scores, the choice of the lowest blocks, one-shot block pruning."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxdbsr
from fxdbsr.layers import blocked_layers
from fxdbsr.ranking import block_scores, lowest
from fxdbsr.scales import block_costs, record_positions


def net() -> nn.Module:
    """Three convs in a row, with edge blocks and groups, blocks of 4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.Conv2d(10, 12, 1, groups=2), nn.Conv2d(12, 9, 3, bias=False))
    return fxdbsr.prepare(model, 4)


def off(model: nn.Module) -> list[int]:
    return [int((~layer.mask).sum()) for layer in blocked_layers(model)]


def test_l2_is_the_mean_square_of_the_real_block() -> None:
    model = net()
    layers = blocked_layers(model)
    for layer in layers:
        nn.init.normal_(layer.scale)
    for layer, score in zip(layers, block_scores(layers), strict=True):
        grid = layer.grid
        rows, columns = list(grid.rows()), list(grid.columns())
        for (r, (a, b)), (c, (d, e)) in [((r, x), (c, y)) for r, x in enumerate(rows) for c, y in enumerate(columns)]:
            block = layer.weight[a:b, d:e].double()
            expected = layer.scale[r, c].double() ** 2 * block.square().mean()
            got = score.view(grid.shape)[r, c].double()
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_the_clamped_form_scores_clamped_scales() -> None:
    model = fxdbsr.prepare(nn.Sequential(nn.Conv2d(4, 8, 1)), 4, form="clamp")
    (layer,) = blocked_layers(model)
    layer.scale.data.copy_(torch.tensor([[-3.0], [2.0]]))
    assert block_scores([layer], "scale")[0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("score", ["l2", "scale", "random"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.77])
def test_the_number_of_blocks_is_exact(scope: str, score: str, sparsity: float) -> None:
    model = net()
    sizes = [layer.mask.numel() for layer in blocked_layers(model)]
    fxdbsr.block_prune_(model, sparsity, score=score, scope=scope, generator=torch.Generator().manual_seed(3))
    if scope == "layer":
        assert off(model) == [round(sparsity * n) for n in sizes]
    else:
        assert sum(off(model)) == round(sparsity * sum(sizes))


def test_the_lowest_go() -> None:
    model = net()
    layers = blocked_layers(model)
    scores = block_scores(layers)
    fxdbsr.block_prune_(model, 0.5, scope="global", protect=False)
    kept = torch.cat([s[layer.mask.flatten()] for s, layer in zip(scores, layers, strict=True)])
    lost = torch.cat([s[~layer.mask.flatten()] for s, layer in zip(scores, layers, strict=True)])
    assert lost.max() <= kept.min()


def test_blocks_that_are_off_already_count() -> None:
    model = net()
    fxdbsr.block_prune_(model, 0.5, score="random", generator=torch.Generator().manual_seed(0))
    before = [layer.mask.clone() for layer in blocked_layers(model)]
    fxdbsr.block_prune_(model, 0.5)
    assert all(torch.equal(a, layer.mask) for a, layer in zip(before, blocked_layers(model), strict=True))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_protection_keeps_one_block_of_each_conv_in_a_row(scope: str) -> None:
    model = net()
    sizes = [layer.mask.numel() for layer in blocked_layers(model)]
    fxdbsr.block_prune_(model, 1.0, scope=scope)
    assert off(model) == [n - 1 for n in sizes]
    fxdbsr.block_prune_(model, 1.0, scope=scope, protect=False)
    assert off(model) == sizes


def test_masks_stay_off_in_training() -> None:
    model = net()
    fxdbsr.block_prune_(model, 0.5)
    before = off(model)
    optimizer = torch.optim.SGD(fxdbsr.param_groups(model, 1e-4), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    assert off(model) == before


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"sparsity": 1.5}, ValueError, r"sparsity: .*got 1\.5"),
        ({"sparsity": float("nan")}, ValueError, "sparsity"),
        ({"sparsity": "half"}, TypeError, "sparsity"),
        ({"sparsity": 0.5, "score": "taylor"}, ValueError, "score: .*taylor"),
        ({"sparsity": 0.5, "scope": "model"}, ValueError, "scope: .*model"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    model = net()
    with pytest.raises(error, match=text):
        fxdbsr.block_prune_(model, **arguments)
    assert sum(off(model)) == 0


def test_a_model_without_scales_and_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="prepare"):
        fxdbsr.block_prune_(nn.Sequential(nn.Conv2d(3, 4, 1)), 0.5)
    model = net()
    blocked_layers(model)[1].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^1: .*NaN"):
        fxdbsr.block_prune_(model, 0.5)


def test_lowest_comes_within_half_a_block_of_the_amount() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores, costs = torch.rand(40, generator=generator), torch.rand(40, generator=generator).double()
        amount = float(torch.rand((), generator=generator) * costs.sum())
        chosen = lowest(scores, costs, [40], amount)
        border = max(float(costs[chosen].max()), float(costs[~chosen].max())) if 0 < chosen.sum() < 40 else 1.0
        assert abs(float(costs[chosen].sum()) - amount) <= border / 2 + 1e-9


def test_of_two_layers_of_which_one_must_live_the_better_lives() -> None:
    def one_lives(dead: AbstractSet[int]) -> bool:
        return len(dead) < 2

    scores = torch.tensor([1.0, 5.0, 2.0, 4.0])
    chosen = lowest(scores, torch.ones(4), [2, 2], 4.0, one_lives)
    assert chosen.tolist() == [True, False, True, True]


def test_blocks_that_cost_nothing_stay() -> None:
    scores, costs = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.0, 1.0, 1.0])
    assert lowest(scores, costs, [1, 2], 1.0).tolist() == [False, True, False]


def macs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    layers = blocked_layers(model)
    record_positions(model, layers, x)
    return block_costs(layers, "macs", measured=True)


def one_forward(model: nn.Module) -> Tensor:
    y: Tensor = model(torch.randn(2, 3, 8, 8))
    return y


def test_mac_costs_are_weights_times_positions() -> None:
    model = net()
    layers = blocked_layers(model)
    with pytest.raises(ValueError, match=r"0: .*forward.*example_inputs"):
        block_costs(layers, "macs")
    one_forward(model)
    sums = [float(c.sum()) for c in block_costs(layers, "macs")]
    assert sums == [10 * 3 * 9 * 36, 12 * 5 * 36, 9 * 12 * 9 * 16]
    model.train()
    model.get_submodule("1").eval()
    sums = [float(c.sum()) for c in macs_of(model, torch.zeros(1, 3, 7, 5))]
    assert sums == [10 * 3 * 9 * 15, 12 * 5 * 15, 9 * 12 * 9 * 3]
    assert [m.training for m in model.children()] == [True, False, True]


def test_calls_and_users_of_one_weight_add_up() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, stride=2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(self.a(x)))
            return y

    model = fxdbsr.prepare(Twice(), 2)
    assert len(blocked_layers(model)) == 1
    (cost,) = macs_of(model, torch.zeros(1, 4, 9, 9))
    assert float(cost.sum()) == 4 * 4 * 9 * (7 * 7 + 5 * 5 + 2 * 2)


@pytest.mark.parametrize("weight", ["blocks", "params", "macs"])
def test_the_penalty_is_the_sum_of_scales_times_costs(weight: str) -> None:
    model = net()
    layers = blocked_layers(model)
    for layer in layers:
        nn.init.normal_(layer.scale)
    layers[0].mask[0, 0] = False
    x = torch.zeros(1, 3, 8, 8)
    value = fxdbsr.penalty(model, weight, x)
    torch.autograd.backward(value)
    costs = block_costs(layers, weight)
    expected = sum(float((la.scale.detach().abs() * la.mask * c).sum()) for la, c in zip(layers, costs, strict=True))
    assert value.shape == ()
    torch.testing.assert_close(value.item(), expected, rtol=1e-6, atol=0)
    for layer, cost in zip(layers, costs, strict=True):
        torch.testing.assert_close(layer.scale.grad, (layer.scale.sign() * layer.mask * cost).float())


def test_penalty_names_an_unknown_weight() -> None:
    with pytest.raises(ValueError, match="flops"):
        fxdbsr.penalty(net(), "flops")


def test_param_groups_hold_every_trainable_parameter_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.norm, self.fc = nn.LayerNorm([8, 6]), nn.Linear(48, 5)
            self.frozen = nn.Linear(5, 5)
            self.frozen.weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.frozen(self.fc(self.norm(self.bn(self.conv(x)).mean(2)).flatten(1)))
            return y

    model = fxdbsr.prepare(Net(), 4)
    weights, rest, scales = fxdbsr.param_groups(model, 0.1, lr=0.5)
    names = {id(p): n for n, p in model.named_parameters()}
    found = [[names[id(p)] for p in g["params"]] for g in (weights, rest, scales)]
    assert found[0] == ["conv.weight", "fc.weight"]
    assert sorted(found[1]) == sorted(
        ["conv.bias", "bn.weight", "bn.bias", "norm.weight", "norm.bias", "fc.bias", "frozen.bias"]
    )
    assert found[2] == ["conv.scale"]
    assert [g["weight_decay"] for g in (weights, rest, scales)] == [0.1, 0.0, 0.0]
    assert all(g["lr"] == 0.5 for g in (weights, rest, scales))
    assert len(fxdbsr.param_groups(Net(), 0.1)) == 2
    with pytest.raises(ValueError, match="weight_decay"):
        fxdbsr.param_groups(model, float("nan"))


def test_block_scales_are_the_parameters_by_layer() -> None:
    model = net()
    scales = fxdbsr.block_scales(model)
    assert list(scales) == ["0", "1", "2"]
    assert scales["1"] is model.get_parameter("1.scale")
