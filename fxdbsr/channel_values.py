"""The channels of one tensor, and how the forward may read a tensor's sizes."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

UNKNOWN = float("nan")


@dataclass(frozen=True)
class Value:
    """The channels of a tensor.

    Attributes:
        labels: `[C]` int64, the variable of each channel; channels of one variable stay or go together.
        constant: `[C]` float64, what each channel holds at every place, NaN where that is not known.
        axis: of the channels, 1 or -1.
        rank: number of axes, batch included, None where not known.
        flat: each channel stands for an unknown number of features, one after the other: [N, C * H * W].
    """

    labels: Tensor
    constant: Tensor
    axis: int = 1
    rank: int | None = None
    flat: bool = False

    def holding(self, constant: Tensor) -> Value:
        """The same channels with other constants; infinities count as unknown."""
        return replace(self, constant=torch.where(constant.isfinite(), constant, UNKNOWN))

    def take(self, index: Tensor | slice) -> Value:
        """The channels at `index`."""
        return replace(self, labels=self.labels[index], constant=self.constant[index])

    def is_channel_axis(self, axis: object) -> bool:
        """True where `axis`, of any sign, surely is the one of the channels."""
        return self.rank is not None and isinstance(axis, int) and axis % self.rank == self.axis % self.rank


@dataclass
class Ties:
    """Pairs of channels that stay or go together, collected while values flow."""

    pairs: list[tuple[Tensor, Tensor]]


def is_size(size: Any, tensor: Any, axis: int) -> bool:
    """True where the node `size` is `tensor.size(axis)` or `tensor.shape[axis]`."""
    if not isinstance(size, fx.Node) or len(size.args) != 2 or not _equal(size.args[1], axis):
        return False
    source = size.args[0]
    if size.op == "call_method" and size.target == "size":
        return source is tensor
    whole = size.target is operator.getitem and isinstance(source, fx.Node) and is_shape(source)
    return whole and source.args[0] is tensor  # type: ignore[union-attr]


def _equal(index: Any, axis: int) -> bool:
    return isinstance(index, int) and index == axis


def is_shape(node: fx.Node) -> bool:
    """True where `node` is `x.shape` or `x.size()`."""
    if node.target is getattr:
        return len(node.args) == 2 and isinstance(node.args[1], str) and node.args[1] == "shape"
    return node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs
