"""Channel shuffles, written out as views and a transpose in the forward: found, and made one node.

    x.view(N, groups, C // groups, H, W).transpose(1, 2).contiguous().view(N, C, H, W)  ->  shuffle(x, groups)

ShuffleNets mix their groups so. The sizes must be those of `x`, or it is no shuffle of channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxdbsr.channel_values import is_size

_VIEWS = ("view", "reshape", torch.reshape)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channels `[0, 1, 2, 3, 4, 5]` of `x [N, C, *size]`, in 2 groups, as `[0, 3, 1, 4, 2, 5]`."""
    mixed: Tensor = x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
    return mixed


def name_shuffles(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Put a call of `shuffle` in the place of every shuffle; returns the view that each one stands for."""
    found = {}
    for node in list(graph.nodes):
        match = match_shuffle(node)
        if match is not None:
            with graph.inserting_after(node):
                new = graph.call_function(shuffle, match)
            node.replace_all_uses_with(new)
            found[new] = node
    return found


def match_shuffle(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(x, groups) where `node` is the last view of a shuffle."""
    last = _view(node)
    source = last[0] if last else None
    if isinstance(source, fx.Node) and source.target == "contiguous":
        source = source.args[0]
    if last is None or not isinstance(source, fx.Node) or not _swaps_groups(source):
        return None
    first = _view(source.args[0])
    if first is None or len(first[1]) != len(last[1]) + 1 or len(last[1]) < 2:
        return None
    x, sizes = first
    kept = [(sizes[0], last[1][0], 0)]
    kept += [(a, b, axis) for axis, (a, b) in enumerate(zip(sizes[3:], last[1][2:], strict=True), 2)]
    own = isinstance(x, fx.Node) and all(is_size(a, x, axis) and is_size(b, x, axis) for a, b, axis in kept)
    return (x, sizes[1]) if own and isinstance(sizes[1], int) and sizes[1] > 0 else None


def _view(node: Any) -> tuple[Any, list[Any]] | None:
    """(x, sizes) where `node` is a view of x."""
    if not isinstance(node, fx.Node) or node.target not in _VIEWS or node.kwargs or len(node.args) < 2:
        return None
    sizes = node.args[1] if isinstance(node.args[1], Sequence) else node.args[1:]
    return node.args[0], list(sizes)


def _swaps_groups(node: fx.Node) -> bool:
    """True where `node` swaps the axes 1 and 2."""
    if node.op not in ("call_function", "call_method") or node.kwargs:
        return False
    if node.target in (torch.transpose, "transpose"):
        return sorted(map(str, node.args[1:])) == ["1", "2"]
    order = node.args[1] if len(node.args) == 2 else node.args[1:]
    swapped = [0, 2, 1, *range(3, len(order))] if isinstance(order, Sequence) else None
    return node.target in (torch.permute, "permute") and swapped == list(order)  # type: ignore[arg-type]
