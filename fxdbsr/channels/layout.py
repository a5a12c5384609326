"""Operations that put channels together, take them apart, or add axes and channels around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fxdbsr.channels.edits import DropEmpty, Path, SetNumber, Split
from fxdbsr.channels.facts import Facts, Op
from fxdbsr.channels.values import UNKNOWN, Parts, Size, Value
from fxdbsr.channels.views import sizes_of


def squeezed(op: Op, facts: Facts) -> Any:
    """squeeze and unsqueeze of an axis that is not the channels'."""
    x, axis = op.x, op.get(1, "dim")
    if not isinstance(x, Value) or x.shape is None or x.flat or not isinstance(axis, int):
        return None
    if op.name == "unsqueeze":
        at = axis % (len(x.shape) + 1)
        return x.placed(x.axis + (at <= x.axis), (*x.shape[:at], 1, *x.shape[at:]))
    at = axis % len(x.shape)
    if at == x.axis or not isinstance(x.shape[at], int):
        return None
    return x if x.shape[at] != 1 else x.placed(x.axis - (at < x.axis), (*x.shape[:at], *x.shape[at + 1 :]))


def cat(op: Op, facts: Facts) -> Any:
    """Channels one after the other."""
    values = list(op.args[0]) if op.args and isinstance(op.args[0], Sequence) else op.kwargs.get("tensors", [])
    if not values or not all(isinstance(v, Value) and not v.flat for v in values):
        return None
    first, axis = values[0], op.get(1, "dim", 0)
    if any((v.axis, v.rank) != (first.axis, first.rank) for v in values) or not first.is_channel_axis(axis):
        return None
    labels, constant = torch.cat([v.labels for v in values]), torch.cat([v.constant for v in values])
    facts.edits.append(DropEmpty(op.node, [value.labels for value in values]))
    shape = first.shape and tuple(len(labels) if i == first.axis else n for i, n in enumerate(first.shape))
    return Value(labels, constant, first.axis, shape)


def chunk(op: Op, facts: Facts) -> Any:
    """A list of values, cut where torch cuts."""
    x = op.x
    sizes = op.get(1, "chunks" if op.name == "chunk" else "split_size_or_sections", op.kwargs.get("split_size"))
    if not isinstance(x, Value) or x.flat or not x.is_channel_axis(op.get(2, "dim", 0)):
        return None
    if not isinstance(sizes, int) and not (isinstance(sizes, Sequence) and all(isinstance(n, int) for n in sizes)):
        return None
    cut: Any = torch.chunk if op.name == "chunk" else torch.split
    parts = [x.take(index) for index in cut(torch.arange(len(x.labels)), sizes)]
    facts.edits.append(Split(op.node, [part.labels for part in parts], x.axis))
    return parts


def unbind(op: Op, facts: Facts) -> Any:
    """The channels one by one: those of them stay that are taken."""
    x = op.x
    known = isinstance(x, Value) and not x.flat and x.is_channel_axis(op.get(1, "dim", 0))
    return Parts(x) if known else None


def expand(op: Op, facts: Facts) -> Any:
    """x.expand(sizes) and x.expand_as(y): axes other than the channels' grow."""
    x = op.x
    if not isinstance(x, Value) or x.shape is None or x.flat:
        return None
    if op.name == "expand_as":
        y = op.get(1, "other")
        if not isinstance(y, Value) or (y.axis, y.rank, len(y.labels)) != (x.axis, x.rank, len(x.labels)) or y.flat:
            return None
        facts.tie(x.labels, y.labels)
        return replace(x, shape=y.shape)
    given = sizes_of(op, 1, "size")
    if given is None or len(given[0]) != len(x.shape) or not all(isinstance(n, int | Size) for n in given[0]):
        return None
    sizes, (*head, start) = given
    if sizes[x.axis] == len(x.labels):
        facts.edits.append(SetNumber(op.node, (*head, start + x.axis), x.labels))  # type: ignore[operator]
    elif sizes[x.axis] != -1:
        return None
    return replace(x, shape=tuple(m if n == -1 else n for m, n in zip(x.shape, sizes, strict=True)))


def pad(op: Op, facts: Facts) -> Any:
    """Padding of spatial axes keeps constants that it equals; zeros beside the channels are channels that hold zero."""
    x, amounts = op.x, op.get(1, "pad")
    if not isinstance(x, Value) or x.shape is None or x.flat or not isinstance(amounts, Sequence):
        return None
    amounts = list(amounts)
    if not all(isinstance(n, int) for n in amounts) or len(amounts) > 2 * (len(x.shape) - 1):
        return None
    sides = {len(x.shape) - 1 - i // 2: tuple(amounts[i : i + 2]) for i in range(0, len(amounts), 2)}
    around = sides.pop(x.axis, (0, 0))
    shape = tuple(Size(str(op.node), i) if any(sides.get(i, ())) else n for i, n in enumerate(x.shape))
    mode, fill = op.get(2, "mode", "constant"), op.get(3, "value")
    fill = 0.0 if fill is None else fill
    if mode != "constant":
        return None if any(around) else x.placed(x.axis, shape)
    if any(any(side) for side in sides.values()):
        x = x.holding(x.constant.where(x.constant == fill, UNKNOWN))
    if any(n < 0 for n in around) or not isinstance(fill, int | float):
        return None
    place = 2 * (len(x.shape or ()) - 1 - x.axis)
    path: Path = (1,) if len(op.node.args) > 1 else ("pad",)
    whole = [(facts.fresh(n), torch.full((n,), float(fill), dtype=torch.float64)) for n in around]
    for i, (labels, _) in enumerate(whole):
        if len(labels):
            facts.edits.append(SetNumber(op.node, (*path, place + i), labels))
    labels, constant = (torch.cat(three) for three in zip(whole[0], (x.labels, x.constant), whole[1], strict=True))
    return Value(labels, constant, x.axis, tuple(len(labels) if i == x.axis else n for i, n in enumerate(shape)))


def pixel_shuffle(op: Op, facts: Facts) -> Any:
    """[N, C * r * r, H, W] -> [N, C, H * r, W * r]: the r * r channels of one stay or go together."""
    x, r = op.x, op.get(1, "upscale_factor")
    if not isinstance(x, Value) or x.shape is None or (x.axis, len(x.shape)) != (1, 4) or not isinstance(r, int):
        return None
    sets, held = x.labels.view(-1, r * r), x.constant.view(-1, r * r)
    facts.tie(sets[:, :1].expand_as(sets).flatten(), sets.flatten())
    constant = torch.where((held == held[:, :1]).all(1), held[:, 0], UNKNOWN)
    sizes = (x.shape[0], len(sets), Size(str(op.node), 2), Size(str(op.node), 3))
    return Value(sets[:, 0], constant, 1, sizes)
