"""What each operation does to the channels of its input: a table from operations to small rules.

A rule gets the node and its arguments with values in the place of nodes, and returns the value of the result:
which variable each channel belongs to, and which channels are known constants. It returns None where it cannot
tell; all channels that the operation reads then stay. Operations without a rule read all channels, too.

Every rule takes the first axis for the batch, as torch's batch norms and losses do.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxdbsr.channel_values import UNKNOWN, Ties, Value, is_size
from fxdbsr.graph import called_module

Rule = Callable[[fx.Node, list[Any], Ties], Any]


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """The argument that `node` gets at `position` or by `name`; a module's attribute of that name."""
    module = called_module(node)
    if module is not None:
        return getattr(module, name, default)
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def callable_of(node: fx.Node) -> Callable[..., Any]:
    """What `node` calls, as a function of tensors."""
    module = called_module(node)
    if module is not None:
        return module
    return getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target


def same(node: fx.Node, args: list[Any], ties: Ties) -> Any:
    """Every channel as it was: copies and the like."""
    return args[0]


def spatial(axes: int | None, rule: Rule) -> Rule:
    """`rule`, for values `[N, C, *size]` with so many spatial axes (None: any number) alone."""

    def checked(node: fx.Node, args: list[Any], ties: Ties) -> Any:
        x = args[0]
        if not isinstance(x, Value) or x.axis != 1 or x.rank is None or x.rank < 3:
            return None
        return None if axes is not None and x.rank != axes + 2 else rule(node, args, ties)

    return checked


def elementwise(node: fx.Node, args: list[Any], ties: Ties) -> Any:
    """f(x, numbers): a constant becomes f(constant)."""
    numbers = [*args[1:], *node.kwargs.values()]
    if not isinstance(args[0], Value) or not all(n is None or isinstance(n, bool | int | float | str) for n in numbers):
        return None
    return args[0].holding(callable_of(node)(args[0].constant.clone(), *args[1:], **node.kwargs))


def binary(node: fx.Node, args: list[Any], ties: Ties) -> Any:
    """f(x, y): channels of two values are tied; zero times a finite number is zero."""
    if node.kwargs or len(args) != 2:
        return None
    values = [a for a in args if isinstance(a, Value)]
    function = callable_of(node)
    if len(values) == 1 and all(isinstance(a, Value | int | float) for a in args):
        first, second = (a.constant.clone() if isinstance(a, Value) else a for a in args)
        return values[0].holding(function(first, second))
    if len(values) < 2:
        return None
    a, b = values
    if a.flat or b.flat or (a.axis, a.rank, len(a.labels)) != (b.axis, b.rank, len(b.labels)):
        return None
    ties.pairs.append((a.labels, b.labels))
    result = function(a.constant.clone(), b.constant)
    if node.target in _PRODUCTS:
        result = torch.where((a.constant == 0) | (b.constant == 0), 0.0, result)
    return a.holding(result)


def max_pool(node: fx.Node, args: list[Any], ties: Ties) -> Any:
    """Padding never wins, so constants stay."""
    if argument(node, 6, "return_indices", False) or argument(node, 4, "dilation", 1) not in (1, (1, 1), (1,)):
        return None
    return args[0]


def average_pool(node: fx.Node, args: list[Any], ties: Ties) -> Any:
    """Constants stay; with padding or a divisor of one's own only zero does."""
    padding = argument(node, 3, "padding", 0)
    padded = any(padding) if isinstance(padding, Sequence) else padding != 0
    if not isinstance(args[0], Value):
        return None
    if padded or argument(node, 6, "divisor_override") is not None:
        return args[0].holding(args[0].constant.where(args[0].constant == 0, UNKNOWN))
    return args[0]


def dropout(node: fx.Node, args: list[Any], ties: Ties) -> Any:
    """The identity, in eval mode alone."""
    position = 3 if getattr(node.target, "__name__", "") == "stochastic_depth" else 2
    return args[0] if argument(node, position, "training", True) is False else None


def pad(node: fx.Node, args: list[Any], ties: Ties) -> Any:
    """Padding of the spatial axes: zeros keep zero, the other modes keep every constant."""
    x, amounts = args[0], argument(node, 1, "pad")
    if not isinstance(x, Value) or x.axis != 1 or x.rank is None or not isinstance(amounts, Sequence):
        return None
    if len(amounts) > 2 * (x.rank - 2):
        return None
    if argument(node, 2, "mode", "constant") != "constant":
        return x
    zeros = argument(node, 3, "value", None) in (None, 0)
    return x.holding(x.constant.where((x.constant == 0) & zeros, UNKNOWN))


def mean(node: fx.Node, args: list[Any], ties: Ties) -> Any:
    """The mean over all spatial axes."""
    x, axes = args[0], argument(node, 1, "dim")
    axes = (axes,) if isinstance(axes, int) else axes
    if not isinstance(x, Value) or x.rank is None or x.axis != 1 or not isinstance(axes, Sequence):
        return None
    if not all(isinstance(a, int) for a in axes) or {a % x.rank for a in axes} != set(range(2, x.rank)):
        return None
    return x if argument(node, 2, "keepdim", False) is True else replace(x, rank=2)


def flatten(node: fx.Node, args: list[Any], ties: Ties) -> Any:
    """[N, C, H, W] -> [N, C * H * W]."""
    x = args[0]
    if argument(node, 1, "start_dim", 0) != 1 or argument(node, 2, "end_dim", -1) != -1:
        return None
    return _flattened(x) if isinstance(x, Value) else None


def view(node: fx.Node, args: list[Any], ties: Ties) -> Any:
    """x.view(x.size(0), -1) is a flatten; other shapes are not derived."""
    sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], Sequence) else node.args[1:]
    if not isinstance(args[0], Value) or len(sizes) != 2 or sizes[1] != -1 or node.kwargs:
        return None
    return _flattened(args[0]) if is_size(sizes[0], node.args[0], 0) else None


def _flattened(x: Value) -> Value | None:
    if x.axis != 1 or x.rank is None:
        return None
    return replace(x, rank=2, flat=x.flat or x.rank > 2)


def cat(node: fx.Node, args: list[Any], ties: Ties) -> Any:
    """Channels one after the other."""
    values = list(args[0]) if args and isinstance(args[0], Sequence) else []
    if not values or not all(isinstance(v, Value) and v.rank is not None and not v.flat for v in values):
        return None
    first, axis = values[0], argument(node, 1, "dim", 0)
    if not first.is_channel_axis(axis) or any((v.axis, v.rank) != (first.axis, first.rank) for v in values):
        return None
    labels, constant = torch.cat([v.labels for v in values]), torch.cat([v.constant for v in values])
    return replace(first, labels=labels, constant=constant)


def chunk(node: fx.Node, args: list[Any], ties: Ties) -> Any:
    """A list of values, cut where torch cuts."""
    x, sizes = args[0], argument(node, 1, "chunks" if _name(node) == "chunk" else "split_size_or_sections")
    sizes = node.kwargs.get("split_size", sizes)
    if not isinstance(x, Value) or x.flat or not x.is_channel_axis(argument(node, 2, "dim", 0)):
        return None
    whole = isinstance(sizes, int) or (isinstance(sizes, Sequence) and all(isinstance(n, int) for n in sizes))
    if not whole:
        return None
    cut = torch.chunk if _name(node) == "chunk" else torch.split
    return [x.take(index) for index in cut(torch.arange(len(x.labels)), sizes)]


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def item(node: fx.Node, args: list[Any], ties: Ties) -> Any:
    """One value of a list."""
    return args[0][args[1]] if isinstance(args[0], list) and isinstance(args[1], int) else None


_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_BINARY = {
    *_PRODUCTS,
    *(operator.add, operator.iadd, torch.add, "add", "add_"),
    *(operator.sub, operator.isub, torch.sub, "sub", "sub_"),
    *(operator.truediv, operator.itruediv, torch.div, "div", "div_"),
    *(torch.maximum, torch.minimum),
}
_ELEMENTWISE = {
    *(nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU),
    *(nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.LogSigmoid),
    *(F.relu, F.relu_, F.relu6, F.silu, F.gelu, F.sigmoid, F.tanh, F.hardswish, F.hardsigmoid, F.leaky_relu),
    *(F.elu, F.selu, F.celu, F.mish, F.softplus, F.softsign, F.hardtanh, F.logsigmoid),
    *(torch.relu, torch.relu_, torch.sigmoid, torch.sigmoid_, torch.tanh, torch.tanh_, torch.abs, torch.neg),
    *(torch.clamp, torch.square, torch.exp, operator.neg, operator.abs, operator.pow, torch.pow),
    *("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "abs", "neg", "clamp", "clamp_", "square", "exp", "pow"),
}
RULES: dict[Any, Rule] = {
    **dict.fromkeys(_BINARY, binary),
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys((nn.Identity, "contiguous", "clone", "detach"), same),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), spatial(None, same)),
    **dict.fromkeys((F.interpolate, F.upsample), spatial(None, same)),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), dropout),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), dropout),
    F.pad: pad,
    **dict.fromkeys((torch.mean, "mean"), mean),
    **dict.fromkeys((torch.flatten, nn.Flatten, "flatten"), flatten),
    **dict.fromkeys(("view", "reshape", torch.reshape), view),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), cat),
    **dict.fromkeys((torch.chunk, torch.split, "chunk", "split"), chunk),
    operator.getitem: item,
}
for _axes, _max, _average, _adaptive in (
    (1, (nn.MaxPool1d, F.max_pool1d), (nn.AvgPool1d, F.avg_pool1d), (nn.AdaptiveAvgPool1d, F.adaptive_avg_pool1d)),
    (2, (nn.MaxPool2d, F.max_pool2d), (nn.AvgPool2d, F.avg_pool2d), (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d)),
    (3, (nn.MaxPool3d, F.max_pool3d), (nn.AvgPool3d, F.avg_pool3d), (nn.AdaptiveAvgPool3d, F.adaptive_avg_pool3d)),
):
    RULES |= dict.fromkeys(_max, spatial(_axes, max_pool)) | dict.fromkeys(_average, spatial(_axes, average_pool))
    RULES |= dict.fromkeys(_adaptive, spatial(_axes, same))

ALIASES = (same, dropout, flatten, view, chunk, item)


def rule_of(node: fx.Node) -> Rule | None:
    """The rule for what `node` calls, or None."""
    module = called_module(node)
    if module is not None:
        return RULES.get(type(module))
    if node.op not in ("call_function", "call_method"):
        return None
    name, home = getattr(node.target, "__name__", ""), getattr(node.target, "__module__", "")
    if name == "stochastic_depth" and home.startswith("torchvision."):
        return dropout
    return RULES.get(node.target)
