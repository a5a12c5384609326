"""Operations that take a part of a value: items of lists, slices and single places of tensors."""

from __future__ import annotations

from typing import Any

import torch

from fxdbsr.channels.edits import Pick, SetPlace
from fxdbsr.channels.facts import Facts, Op
from fxdbsr.channels.values import OPAQUE, Dim, Parts, Size, Value


def item(op: Op, facts: Facts) -> Any:
    """x[index] of a list of values, of channels one by one, or of a tensor."""
    x, index = op.args
    if isinstance(x, list):
        return x[index] if isinstance(index, int) else None
    if isinstance(x, Parts):
        known = isinstance(index, int)
        return _single(op, x.value, index, (1,), facts) if known else None
    return slice_of(op, facts)


def slice_of(op: Op, facts: Facts) -> Any:
    """x[:, 4:8], x[..., 0], x[:, :, None] and the like."""
    x, index = op.args
    entries = _entries(index, x.shape) if isinstance(x, Value) and x.shape is not None and not x.flat else None
    if entries is None:
        return None
    old, at, picked = 0, None, None
    new: list[Dim] = []
    for place, entry in enumerate(entries):
        if entry is None:
            new.append(1)
            continue
        if old == x.axis and isinstance(entry, int):
            path = (
                (1, place) if isinstance(op.node.args[1], tuple) and Ellipsis not in op.node.args[1][:place] else None
            )
            return _single(op, x, entry, path, facts) if path else None
        if old == x.axis:
            at, picked = len(new), None if entry == slice(None) else torch.arange(len(x.labels))[entry]
        if isinstance(entry, slice):
            new.append(x.shape[old] if entry == slice(None) else Size(str(op.node), len(new)))
        old += 1
    assert at is not None
    if picked is None:
        return x.placed(at, tuple(new))
    alone = all(entry == slice(None) for i, entry in enumerate(entries) if i != x.axis)
    return _picked(op, x, picked, facts) if alone else None


def _entries(index: Any, shape: tuple[Dim, ...]) -> list[Any] | None:
    """`index` as one entry an axis, ints, slices and None; None where it holds anything else."""
    given = list(index) if isinstance(index, tuple | list) else [index]
    if not all(entry is None or entry is Ellipsis or isinstance(entry, int | slice) for entry in given):
        return None
    if any(isinstance(entry, bool) for entry in given):
        return None
    missing = len(shape) - sum(isinstance(entry, int | slice) for entry in given)
    place = given.index(Ellipsis) if Ellipsis in given else len(given)
    return [*given[:place], *[slice(None)] * missing, *given[place + 1 :]]


def narrow(op: Op, facts: Facts) -> Any:
    """x.narrow(axis, start, length)."""
    x, axis, start, length = op.x, op.get(1, "dim"), op.get(2, "start"), op.get(3, "length")
    if not isinstance(x, Value) or x.shape is None or x.flat or not isinstance(axis, int):
        return None
    if axis % len(x.shape) != x.axis:
        axis %= len(x.shape)
        return x.placed(x.axis, tuple(Size(str(op.node), i) if i == axis else n for i, n in enumerate(x.shape)))
    if not isinstance(start, int) or not isinstance(length, int):
        return None
    return _picked(op, x, torch.arange(len(x.labels))[start:][:length], facts)


def select(op: Op, facts: Facts) -> Any:
    """x.select(axis, index)."""
    x, axis, index = op.x, op.get(1, "dim"), op.get(2, "index")
    if not isinstance(x, Value) or x.shape is None or x.flat or not isinstance(axis, int):
        return None
    if axis % len(x.shape) != x.axis:
        axis %= len(x.shape)
        return x.placed(x.axis - (axis < x.axis), (*x.shape[:axis], *x.shape[axis + 1 :]))
    path = (2,) if len(op.node.args) > 2 else ("index",)
    return _single(op, x, index, path, facts) if isinstance(index, int) else None


def _picked(op: Op, x: Value, index: torch.Tensor, facts: Facts) -> Value | None:
    if op.node in facts.frozen_memory or not len(index):
        return None
    facts.edits.append(Pick(op.node, op.node, x.labels, index, x.axis))
    return x.take(index)


def _single(op: Op, x: Value, index: int, path: Any, facts: Facts) -> Any:
    """The channel at `index` alone, which stays; the argument that says so is at `path`."""
    position = index % len(x.labels)
    facts.pinned.append((x.labels[position : position + 1], f"{op.node} reads them"))
    facts.edits.append(SetPlace(op.node, path, x.labels, position))
    return OPAQUE
