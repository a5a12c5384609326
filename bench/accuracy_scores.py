"""Scores of blocks that look at more than the block, for leads of bench/accuracy.py.

`e` is the mean square of a block's weights, `[rows, columns]` for each layer.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def of_the_larger(e: Tensor) -> Tensor:
    """`e` as a share of all blocks of the layer that are as large or larger.

    The score of Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, for blocks. The largest
    block of every layer has 1.
    """
    order = e.flatten().argsort(descending=True)
    shares = e.flatten()[order] / e.flatten()[order].cumsum(0)
    return shares[order.argsort()].view_as(e)


def with_its_row(e: Tensor) -> Tensor:
    """`e` times the root of its row's part in the layer, so that outputs go as a whole."""
    return e * _part(e, 1)


def with_its_column(e: Tensor) -> Tensor:
    """`e` times the root of its column's part in the layer, so that inputs go as a whole."""
    return e * _part(e, 0)


def with_both(e: Tensor) -> Tensor:
    """`e` times the roots of its row's and its column's parts."""
    return e * _part(e, 0) * _part(e, 1)


def _part(e: Tensor, axis: int) -> Tensor:
    return (e.mean(axis, keepdim=True) / e.mean().clamp_min(1e-30)).sqrt()


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "share": of_the_larger,
    "row": with_its_row,
    "column": with_its_column,
    "both": with_both,
}
