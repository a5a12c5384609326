"""Channels followed through every kind of operation: what leaves, and what stays and says why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxdbsr
from fxdbsr.channels.flow import Flow
from fxdbsr.channels.values import Value
from fxdbsr.layers import blocked_layers
from fxdbsr.passes.selection import CONV_TYPES


class Net(nn.Module):
    """Layers and a function of them and the input."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def conv(i: int, o: int, k: int = 1, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **({"bias": False} | kwargs))


def left(model: nn.Module, x: Tensor, off: dict[str, Any], block: Any = 1) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights after `convert`, held to be equal, with the block rows `off` of layers switched off.

    Rows below zero, -1 - c, stand for the column c.
    """
    prepared = fxdbsr.prepare(model.double().eval(), block, types=(*CONV_TYPES, nn.Linear))
    for layer in blocked_layers(prepared):
        mask = layer.mask.clone()
        for which in off.get(layer.name, ()):
            if which < 0:
                mask[:, -1 - which] = False
            else:
                mask[which] = False
        layer.set_mask(mask)
    found = fxdbsr.convert(prepared, backend="dense")
    with torch.no_grad():
        torch.testing.assert_close(found(x), prepared(x), rtol=1e-10, atol=1e-10)
        batch = torch.cat([x, x + 1, x - 1])
        torch.testing.assert_close(found(batch), prepared(batch), rtol=1e-10, atol=1e-10)
    return {name: tuple(m.grid.weight_shape) for name, m in found.named_modules() if hasattr(m, "grid")}


X = torch.randn(2, 4, 6, 6, dtype=torch.float64)


def after(function: Callable[[Tensor], Any], channels: int = 8, **layers: Any) -> Net:
    """conv `a` to 8 channels, `function`, and conv `b`."""
    return Net(lambda m, x: m.b(function(m.a(x))), a=conv(4, 8, bias=True), b=conv(channels, 4), **layers)


def shuffled_by_permute(y: Tensor) -> Any:
    n, c, h, w = y.shape
    return y.reshape(n, 4, c // 4, h, w).permute(0, 2, 1, 3, 4).reshape(n, -1, h, w)


def shuffled_by_flatten(y: Tensor) -> Any:
    return y.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)


def shuffled_twice(y: Tensor) -> Tensor:
    return F.channel_shuffle(shuffled_by_permute(y), 2)


# name: (function of a's output, channels after it, rows of a off, columns of b off, outputs of a and inputs of b left)
FOLLOWED: dict[str, tuple[Callable[[Tensor], Any], int, list[int], list[int], tuple[int, int]]] = {
    "slice": (lambda y: y[:, 2:6], 4, [2, 7], [1], (2, 2)),
    "strided slice": (lambda y: y[:, 1::3], 3, [], [0], (2, 2)),
    "slice from the end": (lambda y: y[:, -3:, 1:], 3, [], [], (8, 3)),
    "ellipsis": (lambda y: y[:, 4:, ...], 4, [4], [], (3, 3)),
    "narrow": (lambda y: y.narrow(1, 3, 4), 4, [3], [3], (2, 2)),
    "half": (lambda y: y[:, : y.shape[1] // 2], 4, [0], [], (3, 3)),
    "chunk": (lambda y: y.chunk(3, 1)[1], 3, [3], [], (2, 2)),
    "split": (lambda y: torch.split(y, [5, 3], dim=1)[0], 5, [0], [4], (3, 3)),
    "cat of parts": (lambda y: torch.cat([y.chunk(2, 1)[1], y.chunk(2, 1)[0]], 1), 8, [0, 7], [1], (5, 5)),
    "unbind": (lambda y: torch.stack([y.unbind(1)[3], y.unbind(1)[-1]], 1), 2, [], [], (2, 2)),
    "single channels": (lambda y: torch.stack([y[:, 1], y.select(1, 4)], 1), 2, [], [], (2, 2)),
    "permute": (lambda y: F.relu(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 8, [1], [5], (6, 6)),
    "transpose": (lambda y: y.transpose(1, 3).movedim(3, 1), 8, [1], [5], (6, 6)),
    "shuffle by permute": (shuffled_by_permute, 8, [1, 2], [0, 5], (4, 4)),
    "shuffle by flatten": (shuffled_by_flatten, 8, [1, 2], [0, 5], (4, 4)),
    "shuffle twice": (shuffled_twice, 8, [1, 2], [0, 5], (4, 4)),
    "zeros beside the channels": (lambda y: F.pad(y, (0, 0, 0, 0, 2, 1)), 11, [3], [1, 4], (6, 6)),
    "zeros around": (lambda y: F.pad(F.relu(-y.abs()) * 0, (1, 1)), 8, [0], [], (1, 1)),
    "pixel shuffle": (lambda y: F.pixel_shuffle(y, 2), 2, [], [0], (4, 1)),
    "flatten and back": (lambda y: y.flatten(2).view(y.shape[0], y.shape[1], 6, 6), 8, [1], [5], (6, 6)),
    "view": (lambda y: y.view(y.size(0), y.size(1), -1).view(y.size(0), 8, 6, 6), 8, [1], [5], (6, 6)),
    "expand": (lambda y: y.mean((2, 3), keepdim=True).expand(-1, 8, 3, 3), 8, [1], [5], (6, 6)),
    "expand like": (lambda y: y.amax(3, keepdim=True).expand_as(y), 8, [1], [5], (6, 6)),
    "axes of one": (lambda y: y.unsqueeze(2).squeeze(2)[:, :, None, :, :][:, :, 0], 8, [1], [5], (6, 6)),
    "its number": (lambda y: y / y.size(1) + y.shape[1], 8, [], [5], (7, 7)),
    "its number squared": (lambda y: y * (y.size(1) ** 2), 8, [], [5], (7, 7)),
    "means": (lambda y: y - y.mean(dim=[-1, -2], keepdim=True), 8, [], [5], (7, 7)),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_channels_are_followed_through(name: str) -> None:
    function, channels, rows, columns, expected = FOLLOWED[name]
    found = left(after(function, channels), X, {"a": rows, "b": [-1 - c for c in columns]})
    assert (found["a"][0], found["b"][1]) == expected


def gate(how: str) -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        n, c, _, _ = y.size()
        z = torch.sigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(y, 1).view(n, c)))))
        shape = {"numbers": (n, c, 1, 1), "literal": (-1, 8, 1, 1), "left": (n, -1, 1, 1)}
        return m.b(y * (z[:, :, None, None] if how == "index" else z.view(shape[how])))

    return Net(run, a=conv(4, 8), b=conv(8, 4), down=nn.Linear(8, 4), up=nn.Linear(4, 8))


@pytest.mark.parametrize("how", ["numbers", "literal", "left", "index"])
def test_gates_of_linear_layers_lose_the_channels_that_they_gate(how: str) -> None:
    found = left(gate(how), X, {"a": [0, 5], "b": [-3], "down": [-3]})
    assert found == {"a": (5, 4, 1, 1), "b": (4, 5, 1, 1), "down": (4, 5), "up": (5, 4)}


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1, 1), (1,), ()])
def test_a_factor_and_a_shift_for_each_channel_shrink(shape: tuple[int, ...]) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.randn(shape))
            self.shift = nn.Parameter(torch.randn(shape))

    model = Net(lambda m, x: m.b(m.a(x) * m.layer.factor + m.layer.shift), a=conv(4, 8), b=conv(8, 4), layer=Layer())
    assert left(model, X, {"a": [0, 5], "b": [-3]}) == {"a": (5, 4, 1, 1), "b": (4, 5, 1, 1)}


@pytest.mark.parametrize("norm", [nn.GroupNorm(4, 8), nn.InstanceNorm2d(8, affine=True), nn.PReLU(8), nn.PReLU()])
def test_norms_lose_channels(norm: nn.Module) -> None:
    for parameter in norm.parameters():
        nn.init.uniform_(parameter)
    model = Net(lambda m, x: m.b(m.norm(m.a(x))), a=conv(4, 8), b=conv(8, 4), norm=norm)
    whole_groups = isinstance(norm, nn.GroupNorm)
    found = left(model, X, {"a": [0, 1], "b": [-4, -5]})
    assert (found["a"][0], found["b"][1]) == ((6, 6) if whole_groups else (4, 4))


def test_a_layer_norm_reads_all_channels_but_layers_behind_it_shrink() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.norm(m.a(x).permute(0, 2, 3, 1))
        return m.down(F.gelu(m.up(y))).permute(0, 3, 1, 2)

    layers = {"a": conv(4, 8), "norm": nn.LayerNorm(8), "up": nn.Linear(8, 16), "down": nn.Linear(16, 4)}
    found = left(Net(run, **layers), X, {"a": [0], "up": [3], "down": [-1]})
    assert found == {"a": (8, 4, 1, 1), "up": (14, 8), "down": (4, 14)}


def test_a_branch_without_blocks_is_not_computed() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = F.relu(m.a(x))
        y = y + m.d(F.relu(m.c(y)))
        y = y * torch.sigmoid(m.e(y))
        return m.b(y)

    layers = {"a": conv(4, 8), "c": conv(8, 8, 3, padding=1), "d": conv(8, 8, bias=True), "e": conv(8, 8)}
    model = Net(run, b=conv(8, 4), **layers)
    assert set(left(model, X, {"d": range(8), "e": range(8)})) == {"a", "b"}
    assert set(left(model, X, {"c": range(8), "d": [0]})) == {"a", "b", "e"}


def test_a_part_of_a_concatenation_without_blocks_is_not_computed() -> None:
    def run(m: Any, x: Tensor) -> Any:
        return m.b(torch.cat([m.a(x), F.relu(m.d(F.relu(m.c(x)))), m.e(x)], 1))

    model = Net(run, a=conv(4, 4), c=conv(4, 4), d=conv(4, 4, bias=True), e=conv(4, 4), b=conv(12, 4))
    assert set(left(model, X, {"d": range(4)})) == {"a", "b", "e"}
    assert set(left(model, X, {"b": range(-8, -4)})) == {"a", "b", "e"}
    assert set(left(model, X, {"b": range(-8, 0)})) == {"b", "e"}


@pytest.mark.parametrize(
    ("first", "second", "shape"),
    [
        (nn.Conv1d(4, 8, 3), nn.Conv1d(8, 4, 1), (2, 4, 6)),
        (nn.Conv3d(4, 8, 2), nn.Conv3d(8, 4, (1, 2, 1)), (2, 4, 3, 3, 3)),
        (nn.ConvTranspose1d(4, 8, 3), nn.ConvTranspose1d(8, 4, 1), (2, 4, 6)),
        (nn.ConvTranspose2d(4, 8, 3, stride=2), nn.ConvTranspose2d(8, 4, 2, stride=2), (2, 4, 3, 3)),
        (nn.ConvTranspose3d(4, 8, 2, groups=2), nn.ConvTranspose3d(8, 4, 1), (2, 4, 3, 3, 3)),
        (nn.Linear(4, 8), nn.Linear(8, 4), (2, 4)),
        (nn.Linear(4, 8), nn.Linear(8, 4), (2, 3, 4)),
    ],
)
def test_every_kind_of_layer_shrinks(first: nn.Module, second: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    second.bias = None
    groups = getattr(first, "groups", 1)
    off = {"0": [1, 6], "2": [-1 - 3, -1 - 4]}
    found = left(nn.Sequential(first, nn.ReLU(), second), x, {"0": [], "2": off["2"]})
    out = {name: shape[:2] for name, shape in found.items()}
    transposed = getattr(first, "transposed", False)
    assert out["0"] == ((4, 6 // groups) if transposed else (6, 4))
    assert out["2"] == ((6, 4) if getattr(second, "transposed", False) else (4, 6))


STAYS: dict[str, Callable[[Tensor], Any]] = {
    "softmax over channels": lambda y: torch.softmax(y, 1),
    "view across the image": lambda y: y.view(y.size(0), 4, -1, 6).view(-1, 8, 6, 6),
    "size of everything": lambda y: y.new_ones(y.shape) * y,
    "computed index": lambda y: y[:, torch.arange(8)],
    "overwritten slice": lambda y: y[:, ::2].mul_(2).mean() + y,
    "cumulative sum": lambda y: y.cumsum(1),
    "sum over channels": lambda y: y - y.mean(1, keepdim=True),
    "attention over channels": lambda y: y.flatten(2).softmax(1).view(y.shape),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_is_not_known_stays(name: str) -> None:
    assert left(after(STAYS[name]), X, {"a": [0], "b": [-3]})["a"][0] == 8


def test_every_value_knows_its_sizes() -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.pool(m.a(x))
        return m.b(F.adaptive_avg_pool2d(y, (1, 3)).permute(0, 2, 3, 1).flatten(1, 2).mean(1))

    layers = {"a": conv(4, 8, 3, stride=2, padding=1), "pool": nn.MaxPool2d(2), "b": nn.Linear(8, 3)}
    traced = fx.symbolic_trace(Net(run, **layers).eval())
    values = {node.name: value for node, value in Flow(traced).values.items() if isinstance(value, Value)}
    shapes = {name: value.shape for name, value in values.items()}
    assert shapes["adaptive_avg_pool2d"] == (shapes["a"][0], 8, 1, 3)  # type: ignore[index]
    assert shapes["flatten"] == (shapes["a"][0], 3, 8)  # type: ignore[index]
    assert shapes["b"] == (shapes["a"][0], 3)  # type: ignore[index]
