"""What operations on elements, pools and means do to channels and to the constants that they hold.

A rule gets an operation with values in the place of nodes, and returns what is known of the result: which variable
each channel belongs to, and what it holds. It returns None where it cannot tell; all channels that the operation
reads then stay. `views`, `layout` and `items` hold the rules of operations that move axes; `table` lists all.

Every rule takes the first axis for the batch, as torch's batch norms and losses do.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxdbsr.channels.edits import CutStored, UseConstant
from fxdbsr.channels.facts import Facts, Op
from fxdbsr.channels.values import UNKNOWN, Dim, Size, Stored, Value, after_window
from fxdbsr.graph import writes_in_place

Rule = Callable[[Op, Facts], Any]
PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}


def same(op: Op, facts: Facts) -> Any:
    """Every channel as it was: copies and the like."""
    return op.x


def spatial(axes: int | None, rule: Rule) -> Rule:
    """`rule`, for values `[N, C, *size]` with so many spatial axes (None: any number) alone; sizes change."""

    def checked(op: Op, facts: Facts) -> Any:
        x = op.x
        if not isinstance(x, Value) or x.axis != 1 or x.shape is None or len(x.shape) < 3:
            return None
        found = None if axes is not None and len(x.shape) != axes + 2 else rule(op, facts)
        return found and found.placed(1, (*x.shape[:2], *_sizes(op, x.shape[2:])))

    return checked


def _sizes(op: Op, sizes: tuple[Dim, ...]) -> list[Dim]:
    """What a pool or an interpolation makes of spatial `sizes`; sizes of their own where it does not follow."""
    number = len(sizes)
    if "adaptive" in op.name.lower():
        given = _for_each(op.get(1, "output_size"), number)
        return [n if isinstance(n, int) else Size(str(op.node), 2 + i) for i, n in enumerate(given)]
    kernel, stride, padding = op.get(1, "kernel_size"), op.get(2, "stride"), op.get(3, "padding", 0)
    windows = [_for_each(a, number) for a in (kernel, kernel if stride is None else stride, padding)]
    known = all(isinstance(n, int) for window in windows for n in window)
    if known and "pool" in op.name.lower() and not op.get(5 if "max" in op.name.lower() else 4, "ceil_mode", False):
        return [after_window(n, *window) for n, *window in zip(sizes, *windows, strict=True)]
    return [Size(str(op.node), 2 + i) for i in range(number)]


def _for_each(value: Any, number: int) -> list[Any]:
    """One number as one for each axis, one for each as it is."""
    return list(value)[:number] if isinstance(value, Sequence) else [value] * number


def elementwise(op: Op, facts: Facts) -> Any:
    """f(x, numbers): a constant becomes f(constant)."""
    numbers = [*op.args[1:], *(value for key, value in op.kwargs.items() if key != "input")]
    if not isinstance(op.x, Value) or not all(n is None or isinstance(n, bool | int | float | str) for n in numbers):
        return None
    kwargs = {key: value for key, value in op.kwargs.items() if key != "input"}
    return op.x.holding(op.function(op.x.constant.clone(), *op.args[1:], **kwargs))


def prelu(op: Op, facts: Facts) -> Any:
    """nn.PReLU with one slope for all channels; others are norms' kin."""
    if not isinstance(op.x, Value) or op.module is None or op.module.num_parameters != 1:
        return None
    assert isinstance(op.module.weight, Tensor)
    return op.x.holding(torch.where(op.x.constant < 0, op.x.constant * float(op.module.weight.detach()), op.x.constant))


def binary(op: Op, facts: Facts) -> Any:
    """f(x, y): channels of two values are tied; zero times a finite number is zero."""
    if op.kwargs or len(op.args) != 2:
        return None
    values = [a for a in op.args if isinstance(a, Value)]
    others = [a for a in op.args if not isinstance(a, Value)]
    if len(values) == 2:
        return _of_two(op, values[0], values[1], facts)
    if len(values) != 1:
        return None
    if isinstance(others[0], Stored):
        position = 0 if op.args[0] is others[0] else 1
        written = op.node.args[position] in facts.frozen_memory
        return None if written else _with_stored(op, values[0], position, facts)
    if isinstance(others[0], int | float | Size):
        number = UNKNOWN if isinstance(others[0], Size) else others[0]
        return values[0].holding(_result(op, values[0].constant, number))
    return None


def _of_two(op: Op, a: Value, b: Value, facts: Facts) -> Value | None:
    if a.flat or b.flat or (a.axis, a.rank, len(a.labels)) != (b.axis, b.rank, len(b.labels)):
        return None
    first, second = (a, b) if op.args[0] is a else (b, a)
    shape = _broadcast(op, a.shape, b.shape)
    found = replace(a, shape=shape).holding(_result(op, first.constant, second.constant))
    for position, (constant, other) in enumerate(((first, second), (second, first))):
        written = position == 0 and writes_in_place(op.node)
        if _is_constant(constant) and not _is_constant(other) and shape == other.shape and facts.dtype and not written:
            held = constant.constant.to(facts.dtype)
            facts.edits.append(UseConstant(op.node, position, other.labels, held, other.axis, len(other.shape or ())))
            facts.spared.add((op.node, op.node.args[position]))
            return replace(found, labels=other.labels)
    facts.tie(a.labels, b.labels)
    return found


def _is_constant(x: Value) -> bool:
    return x.shape is not None and not bool(x.constant.isnan().any())


def _broadcast(op: Op, a: tuple[Dim, ...] | None, b: tuple[Dim, ...] | None) -> tuple[Dim, ...] | None:
    if a is None or b is None:
        return None
    axes = enumerate(zip(a, b, strict=True))
    return tuple(m if m == n or n == 1 else n if m == 1 else Size(str(op.node), i) for i, (m, n) in axes)


def _result(op: Op, a: Any, b: Any) -> Tensor:
    """f(a, b) of the constants; zero times anything is zero."""
    a, b = (t.clone() if isinstance(t, Tensor) else t for t in (a, b))
    zero = torch.as_tensor(a == 0) | torch.as_tensor(b == 0)
    result: Tensor = op.function(a, b)
    return torch.where(zero, 0.0, result) if op.node.target in PRODUCTS else result


def _with_stored(op: Op, x: Value, position: int, facts: Facts) -> Value | None:
    """f(x, parameter): the parameter broadcasts along the channels, or holds a number for each of them."""
    tensor = op.args[position].tensor
    behind = None if x.shape is None else len(x.shape) - x.axis  # axes from the channels' on
    if behind is None or x.flat or tensor.dim() > len(x.shape or ()) or not tensor.is_floating_point():
        return None
    axis = tensor.dim() - behind
    wide = axis >= 0 and tensor.shape[axis] > 1
    if wide and tensor.shape[axis] != len(x.labels):
        return None
    if wide:
        facts.edits.append(CutStored(op.node, (position,), tensor, x.labels, axis))
    held = tensor.detach().double().cpu()
    held = held.movedim(axis, -1).reshape(-1, tensor.shape[axis]) if wide else held.reshape(-1, 1)
    single = (held == held[:1]).all(0) & bool(len(held))
    number = torch.where(single, held[0] if len(held) else UNKNOWN, UNKNOWN).expand(len(x.labels))
    first, second = (x.constant, number) if op.args[0] is x else (number, x.constant)
    found = x.holding(_result(op, first, second))
    assert x.shape is not None
    sizes = (*[1] * (len(x.shape) - tensor.dim()), *tensor.shape)
    shape = (m if i == x.axis or n == 1 else n for i, (m, n) in enumerate(zip(x.shape, sizes, strict=True)))
    return replace(found, shape=tuple(shape))


def max_pool(op: Op, facts: Facts) -> Any:
    """Padding never wins, so constants stay."""
    if op.get(6, "return_indices", False) or op.get(4, "dilation", 1) not in (1, (1, 1), (1,)):
        return None
    return op.x


def average_pool(op: Op, facts: Facts) -> Any:
    """Constants stay; with padding or a divisor of one's own only zero does."""
    padding = op.get(3, "padding", 0)
    padded = any(padding) if isinstance(padding, Sequence) else padding != 0
    if padded or op.get(6, "divisor_override") is not None:
        return op.x.holding(op.x.constant.where(op.x.constant == 0, UNKNOWN))
    return op.x


def dropout(op: Op, facts: Facts) -> Any:
    """The identity, in eval mode alone."""
    return op.x if op.get(3 if op.name == "stochastic_depth" else 2, "training", True) is False else None


def mean(op: Op, facts: Facts) -> Any:
    """The mean, the maximum or the minimum over axes other than the channels': constants stay."""
    x, axes = op.x, op.get(1, "dim")
    axes = (axes,) if isinstance(axes, int) else axes
    if not isinstance(x, Value) or x.shape is None or x.flat or not isinstance(axes, Sequence) or not axes:
        return None
    if not all(isinstance(a, int) for a in axes) or x.axis in (gone := {a % len(x.shape) for a in axes}):
        return None
    if op.get(2, "keepdim", False) is True:
        return x.placed(x.axis, tuple(1 if i in gone else n for i, n in enumerate(x.shape)))
    left = tuple(n for i, n in enumerate(x.shape) if i not in gone)
    return x.placed(x.axis - sum(a < x.axis for a in gone), left)
