"""The nets of `bench.random_nets` as they run: a list of steps over a list of values, each with a function here.

A step reads one or two values `[N, C, H, W]` and appends its result. Nets can be copied and pickled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RandomNet(nn.Module):
    """Runs a list of steps.

    Args:
        steps: (name of a function in `STEPS`, positions of the values that it reads, its options).
        layers: the modules that options name.
        out: positions of the values that the net returns.
    """

    def __init__(self, steps: list[tuple[str, list[int], dict[str, Any]]], layers: nn.ModuleDict, out: int) -> None:
        super().__init__()
        self.steps, self.layers, self.out = steps, layers, out

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` to `[N, C]`, or to what the last step gives."""
        values = [x]
        for name, reads, options in self.steps:
            values.append(STEPS[name](self, *(values[i] for i in reads), **options))
        return values[self.out]

    def layer(self, name: str) -> nn.Module:
        """The module of that name."""
        return self.layers[name]


def _module(net: RandomNet, x: Tensor, layer: str) -> Any:
    return net.layer(layer)(x)


def _twice(net: RandomNet, x: Tensor, layer: str) -> Any:
    return net.layer(layer)(x) - net.layer(layer)(2 * x)


def _function(net: RandomNet, x: Tensor, name: str) -> Any:
    return getattr(F, name)(x)


def _in_place(net: RandomNet, x: Tensor, layer: str, after: str) -> Any:
    y = net.layer(layer)(x)
    if after == "add":
        y += 0.5
        return y
    return F.relu(y, inplace=True) if after == "relu" else y.mul_(2)


def _written_late(net: RandomNet, x: Tensor, layer: str) -> Any:
    y = net.layer(layer)(x)
    z = y * 2
    y.add_(1)
    return z + y


def _add(net: RandomNet, x: Tensor, y: Tensor) -> Any:
    return x + y


def _into(net: RandomNet, x: Tensor, y: Tensor) -> Any:
    z = x * 1
    z += y
    return z


def _multiply(net: RandomNet, x: Tensor, y: Tensor) -> Any:
    return torch.sigmoid(x) * y


def _maximum(net: RandomNet, x: Tensor, y: Tensor) -> Any:
    return torch.maximum(x, y)


def _cat(net: RandomNet, x: Tensor, y: Tensor) -> Any:
    return torch.cat([x, y], 1)


def _chunk(net: RandomNet, x: Tensor) -> Any:
    left, right = x.chunk(2, dim=1)
    return left * right


def _swap(net: RandomNet, x: Tensor) -> Any:
    left, right = x.chunk(2, dim=1)
    return torch.cat([right, left], 1)


def _split(net: RandomNet, x: Tensor, first: int) -> Any:
    return torch.split(x, [first, x.shape[1] - first], 1)[0]


def _slice(net: RandomNet, x: Tensor, start: int, step: int) -> Any:
    return x[:, start::step]


def _narrow(net: RandomNet, x: Tensor, start: int, length: int) -> Any:
    return x.narrow(1, start, length)


def _shuffle(net: RandomNet, x: Tensor, groups: int) -> Any:
    n, c, h, w = x.size()
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def _gate(net: RandomNet, x: Tensor, down: str, up: str, linear: bool) -> Any:
    n, c, _, _ = x.shape
    y = x.mean((2, 3)) if linear else F.adaptive_avg_pool2d(x, 1)
    y = torch.sigmoid(net.layer(up)(F.relu(net.layer(down)(y))))
    return x * (y.view(n, c, 1, 1) if linear else y)


def _pad_channels(net: RandomNet, x: Tensor, before: int, after: int) -> Any:
    return F.pad(x, (0, 0, 0, 0, before, after))


def _last(net: RandomNet, x: Tensor, layer: str) -> Any:
    return net.layer(layer)(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _shift(net: RandomNet, x: Tensor, affine: str) -> Any:
    layer: Any = net.layer(affine)
    return x * layer.factor + layer.shift


def _number(net: RandomNet, x: Tensor) -> Any:
    return x / x.size(1)


def _softmax(net: RandomNet, x: Tensor) -> Any:
    return torch.softmax(x, 1)


def _halves(net: RandomNet, x: Tensor, layer: str) -> Any:
    y = net.layer(layer)(F.max_pool2d(x, 2))
    return F.interpolate(y, size=x.shape[-2:])


def _pooled(net: RandomNet, x: Tensor, layer: str, conv: str) -> Any:
    return F.interpolate(net.layer(conv)(net.layer(layer)(x)), size=x.shape[-2:])


def _unbound(net: RandomNet, x: Tensor) -> Any:
    parts = x.unbind(1)
    return torch.stack([parts[-1], parts[0]], 1)


STEPS: dict[str, Callable[..., Any]] = {
    "module": _module, "twice": _twice, "function": _function, "in_place": _in_place, "written_late": _written_late,
    "add": _add, "into": _into, "multiply": _multiply, "maximum": _maximum, "cat": _cat, "chunk": _chunk,
    "swap": _swap, "split": _split, "slice": _slice, "narrow": _narrow, "shuffle": _shuffle, "gate": _gate,
    "pad_channels": _pad_channels, "last": _last, "shift": _shift, "number": _number, "softmax": _softmax,
    "halves": _halves, "pooled": _pooled, "unbound": _unbound,
}  # fmt: skip


class Affine(nn.Module):
    """A factor and a shift for each channel, which the net reads by name."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(channels, 1, 1))
        self.shift = nn.Parameter(torch.randn(1, channels, 1, 1))
