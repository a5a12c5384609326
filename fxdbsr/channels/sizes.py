"""Sizes that the forward reads and computes with: `x.size(0)`, `n, c, h, w = x.shape`, `c // 2`.

The number of channels of a known value is a number. Where the model computes with it, it stays that number when
channels leave; where it is the argument of an operation with a rule, the rule's edits change it.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from fxdbsr.channels.edits import KeepNumber
from fxdbsr.channels.facts import Facts, Op
from fxdbsr.channels.values import OPAQUE, Dim, Folded, Shape, Size, Value

_ARITHMETIC = {
    operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.neg,
    operator.pow, int,
}  # fmt: skip


_SAFE = {"ndim", "dtype", "device", "is_cuda", "layout", "itemsize", "requires_grad"}
_SAFE_METHODS = {"dim", "ndimension", "get_device", "element_size", "is_contiguous", "is_floating_point"}


def reads_no_channels(node: fx.Node) -> bool:
    """True where the result of `node` depends neither on what a tensor holds nor on how many channels it has."""
    if node.target is getattr:
        return len(node.args) == 2 and node.args[1] in _SAFE
    return node.op == "call_method" and node.target in _SAFE_METHODS


def rank_of(op: Op) -> Any:
    """`x.ndim` of a known value, else something unknown."""
    rank = op.node.args[1] == "ndim" if op.node.target is getattr else op.node.target in ("dim", "ndimension")
    return len(op.x.shape) if rank and isinstance(op.x, Value | Folded) and op.x.shape is not None else OPAQUE


def reads_sizes(node: fx.Node) -> bool:
    """True where `node` is `x.shape`, `x.size()` or `x.size(axis)`."""
    if node.target is getattr:
        return len(node.args) == 2 and isinstance(node.args[1], str) and node.args[1] == "shape"
    return node.op == "call_method" and node.target == "size"


def read_sizes(op: Op, facts: Facts, live: set[fx.Node]) -> Any:
    """What `node` of `reads_sizes` gives: a size, the tuple of all of them, or None."""
    x, source = op.x, op.node.args[0]
    axis = None if op.node.target is getattr else op.get(1, "dim")
    if not isinstance(x, Value | Folded) or x.shape is None:
        facts.pin(x, f"{op.node} reads their number")
        if axis is None:
            return Shape(str(source))
        return Size(str(source), axis) if isinstance(axis, int) else None
    if isinstance(x, Folded) or x.flat:
        touched = x.axes if isinstance(x, Folded) else (x.axis,)
        if axis is None or not isinstance(axis, int) or axis % len(x.shape) in touched:
            facts.pin(x, f"{op.node} reads their number")
        return x.shape if axis is None else x.shape[axis] if isinstance(axis, int) else None
    if isinstance(axis, int):
        return _one(op.node, x, axis, facts)
    for user in op.node.users:
        if user in live and not _spares_channels(user, x):
            facts.pin(x, f"{user} reads their number")
    for user in op.node.users:
        if user.target is operator.getitem and isinstance(user.args[1], int):
            _one(user, x, user.args[1], facts)
    return x.shape


def _one(node: fx.Node, x: Value, axis: int, facts: Facts) -> Dim:
    """The size of `x` along `axis`, which `node` gives."""
    assert x.shape is not None
    if axis % len(x.shape) == x.axis:
        facts.edits.append(KeepNumber(node, x.labels))
    return x.shape[axis]


def _spares_channels(user: fx.Node, x: Value) -> bool:
    """True where `user`, which reads the whole shape of `x`, takes single sizes or those of other axes."""
    assert x.shape is not None
    if user.target is not operator.getitem or not isinstance(user.args[1], int | slice):
        return False
    read = range(len(x.shape))[user.args[1]]
    return isinstance(read, int) or x.axis not in read


def computed(op: Op) -> Any:
    """The number that arithmetic on known numbers gives, an item of a shape; None for everything else."""
    node = op.node
    if node.op != "call_function":
        return None
    if node.target is operator.getitem and isinstance(op.args[0], tuple) and isinstance(op.args[1], int | slice):
        return op.args[0][op.args[1]]
    if node.target is operator.getitem and isinstance(op.args[0], Shape) and isinstance(op.args[1], int):
        return Size(op.args[0].node, op.args[1])
    if node.target in _ARITHMETIC and not node.kwargs and op.args:
        if all(isinstance(a, int) for a in op.args):
            found = node.target(*op.args)  # type: ignore[operator]
            return int(found) if found == int(found) else None
        if all(isinstance(a, int | Size) for a in op.args):
            return Size(str(node), -1)
    return None
