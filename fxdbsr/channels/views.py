"""Views: operations that split, join and move axes, and where the channels are afterwards.

A view that splits the axis of the channels gives a `Folded`; one that joins them again, in another order perhaps, a
value again, with an edit that picks the channels that are left. So every shuffle is followed, however written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxdbsr.channels.edits import Path, Pick, SetNumber
from fxdbsr.channels.facts import Facts, Op
from fxdbsr.channels.values import Dim, Folded, Size, Value


def sizes_of(op: Op, position: int, name: str) -> tuple[list[Any], Path] | None:
    """Sizes that `op` is given, as one sequence or one after the other, and the path of the first."""
    if len(op.args) > position and isinstance(op.node.args[position], Sequence):
        return list(op.args[position]), (position, 0)
    if isinstance(op.node.kwargs.get(name), Sequence):
        return list(op.kwargs[name]), (name, 0)
    return (list(op.args[position:]), (position,)) if len(op.args) > position else None


def view(op: Op, facts: Facts) -> Any:
    """x.view(sizes): the channels stay one axis, are split, or are joined."""
    given = sizes_of(op, 1, "shape")
    if given is None or not all(isinstance(size, int | Size) for size in given[0]):
        return None
    sizes, (*head, start) = given
    return reshaped(op, sizes, [(*head, start + i) for i in range(len(sizes))], facts)  # type: ignore[operator]


def reshaped(op: Op, sizes: list[Dim], paths: list[Path] | None, facts: Facts) -> Any:
    """What is known of the value `op.x` with `sizes`, one of them perhaps -1.

    Args:
        paths: of the arguments of `op` that hold the sizes; None where it holds none.
    """
    x = op.x
    if not isinstance(x, Value | Folded) or x.shape is None or (isinstance(x, Value) and x.flat):
        return None
    axes = x.axes if isinstance(x, Folded) else (x.axis,)
    if axes != tuple(range(axes[0], axes[-1] + 1)):
        return None
    count = x.index.numel() if isinstance(x, Folded) else len(x.labels)
    before, after = list(x.shape[: axes[0]]), list(x.shape[axes[-1] + 1 :])
    if isinstance(x, Value) and _is_flattened(sizes, before, after, count):
        if paths and isinstance(sizes[-1], int) and sizes[-1] != -1:
            facts.edits.append(SetNumber(op.node, paths[-1], x.labels, sizes[-1] // count))
        return replace(x, axis=len(sizes) - 1, shape=(*sizes[:-1], Size(str(op.node), len(sizes) - 1)), flat=True)
    middle = _middle(sizes, before, after, count)
    if middle is None:
        return None
    shape = _with_unknown(op, sizes, before, after, middle, count)
    if len(middle) == 1 and isinstance(x, Value):
        if paths and sizes[middle[0]] != -1:
            facts.edits.append(SetNumber(op.node, paths[middle[0]], x.labels))
        return x.placed(middle[0], shape)
    index = (x.index if isinstance(x, Folded) else torch.arange(count)).reshape([shape[i] for i in middle])  # type: ignore
    value, entry = (x.value, x.entry) if isinstance(x, Folded) else (x, op.node)
    return joined(op, Folded(entry, value, index, middle, shape), facts)


def _with_unknown(
    op: Op, sizes: list[Dim], before: list[Dim], after: list[Dim], middle: tuple[int, ...], count: int
) -> tuple[Dim, ...]:
    """`sizes` with what stands for -1, a size of its own where that does not follow."""

    def found(i: int) -> Dim:
        if i in middle:
            return count // _product(sizes, middle)
        side = range(middle[0]) if i < middle[0] else range(middle[-1] + 1, len(sizes))
        beside = [n for n in (before if i < middle[0] else after) if n != 1]
        alone = [j for j in side if sizes[j] != 1] == [i]
        return beside[0] if alone and len(beside) == 1 else Size(str(op.node), i)

    return tuple(found(i) if n == -1 else n for i, n in enumerate(sizes))


def _is_flattened(sizes: list[Dim], before: list[Dim], after: list[Dim], count: int) -> bool:
    """True for [N, C, H, W] -> [N, C * H * W]."""
    if not [n for n in after if n != 1] or sizes[:-1] != before:
        return False
    return sizes[-1] == -1 or (isinstance(sizes[-1], int) and sizes[-1] % count == 0 and sizes[-1] != count)


def _middle(sizes: list[Dim], before: list[Dim], after: list[Dim], count: int) -> tuple[int, ...] | None:
    """Positions in `sizes` over which the `count` channels lie, between the axes `before` and `after` them.

    Sizes of 1 may come and go everywhere. None where that does not follow from the sizes.
    """
    places = [i for i, n in enumerate(sizes) if n != 1]
    given = [sizes[i] for i in places]
    before, after = [n for n in before if n != 1], [n for n in after if n != 1]
    first, last = len(before), len(given) - len(after)
    starts, ends = given[:first] == before, given[max(last, 0) :] == after
    if count == 1 or last < 0:
        return None
    if starts and ends and _fits(given[first:last], count):
        return tuple(places[first:last])
    if starts:
        stops = [i for i in range(first + 1, len(given) + 1) if _product(given, range(first, i), strict=True) == count]
        return tuple(places[first : stops[0]]) if stops else None
    if ends:
        begins = [i for i in range(last) if _product(given, range(i, last), strict=True) == count]
        return tuple(places[begins[-1] : last]) if begins else None
    return None


def _fits(given: list[Dim], count: int) -> bool:
    """True where numbers, one of which may be -1, multiply to `count`."""
    if not given or not all(isinstance(n, int) for n in given):
        return False
    known = _product(given, range(len(given)))
    return known == count if -1 not in given else count % known == 0


def _product(sizes: list[Dim], places: Sequence[int], strict: bool = False) -> int:
    """The product of the numbers at `places` but for -1; 0 where one is none, or is -1 and `strict`."""
    product = 1
    for i in places:
        n = sizes[i]
        if not isinstance(n, int) or (strict and n == -1):
            return 0
        product *= 1 if n == -1 else n
    return product


def joined(op: Op, x: Folded, facts: Facts) -> Any:
    """`x`, or the value that it is where its channels lie along one axis; None where no edit could cut that."""
    if len(x.axes) > 1:
        return x
    (axis,) = x.axes
    assert x.value.shape is not None
    others = [(*s[:a], *s[a + 1 :]) for s, a in ((x.shape, axis), (x.value.shape, x.value.axis))]
    if others[0] != others[1] or axis != x.value.axis or op.node in facts.frozen_memory:
        return None
    index = x.index.flatten()
    facts.edits.append(Pick(op.node, x.entry, x.value.labels, index, axis))
    return x.value.take(index)


def moved(op: Op, facts: Facts) -> Any:
    """permute, transpose and movedim: the channels move with their axes."""
    x = op.x
    order = _order(op, len(x.shape)) if isinstance(x, Value | Folded) and x.shape is not None else None
    if order is None:
        return None
    shape = tuple(x.shape[axis] for axis in order)
    if isinstance(x, Value):
        return None if x.flat else x.placed(order.index(x.axis), shape)
    places = [order.index(axis) for axis in x.axes]
    turned = sorted(range(len(places)), key=places.__getitem__)
    return joined(op, Folded(x.entry, x.value, x.index.permute(turned), tuple(sorted(places)), shape), facts)


def _order(op: Op, rank: int) -> list[int] | None:
    """The axis of the argument that each axis of the result is."""
    if op.name == "permute":
        given = sizes_of(op, 1, "dims")
        order = given[0] if given else []
    else:
        names = ("source", "destination") if op.name == "movedim" else ("dim0", "dim1")
        a, b = (op.get(1 + i, name) for i, name in enumerate(names))
        if not isinstance(a, int) or not isinstance(b, int):
            return None
        order = list(range(rank))
        if op.name == "movedim":
            order.insert(b % rank, order.pop(a % rank))
        else:
            order[a], order[b] = order[b], order[a]
    whole = all(isinstance(axis, int) for axis in order) and len(order) == rank
    return [axis % rank for axis in order] if whole else None


def flatten(op: Op, facts: Facts) -> Any:
    """flatten(start, end): as the view with one size in the place of several."""
    x, start, end = op.x, op.get(1, "start_dim", 0), op.get(2, "end_dim", -1)
    if not isinstance(x, Value | Folded) or x.shape is None or not isinstance(start, int) or not isinstance(end, int):
        return None
    start, end = start % len(x.shape), end % len(x.shape)
    if isinstance(x, Value) and x.flat:
        return x if start == end else None
    inside = [n for n in x.shape[start : end + 1] if n != 1]
    size = -1 if len(inside) > 1 or not inside else inside[0]
    return reshaped(op, [*x.shape[:start], size, *x.shape[end + 1 :]], None, facts)


def unflatten(op: Op, facts: Facts) -> Any:
    """unflatten(axis, sizes) of the channels' axis."""
    x, axis, sizes = op.x, op.get(1, "dim"), op.get(2, "sizes" if op.module is None else "unflattened_size")
    if not isinstance(x, Value) or x.shape is None or not isinstance(axis, int) or not isinstance(sizes, Sequence):
        return None
    at = axis % len(x.shape)
    found = reshaped(op, [*x.shape[:at], *sizes, *x.shape[at + 1 :]], None, facts)
    return found if isinstance(found, Folded) else None


def channel_shuffle(op: Op, facts: Facts) -> Any:
    """nn.ChannelShuffle."""
    x, groups = op.x, op.get(1, "groups")
    if not isinstance(x, Value) or x.axis != 1 or x.shape is None or x.flat or not isinstance(groups, int):
        return None
    index: Tensor = torch.arange(len(x.labels)).view(groups, -1).t().flatten()
    return joined(op, Folded(op.node, x, index, (1,), x.shape), facts)
