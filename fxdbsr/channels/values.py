"""What is known of a value in the graph: the variables of its channels, constants they hold, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, fx

UNKNOWN = float("nan")


@dataclass(frozen=True)
class Size:
    """A size that is not known as a number: that of `node` along `axis`. Equal sizes are equal objects."""

    node: str
    axis: int


Dim: TypeAlias = int | Size


def after_window(n: Dim, kernel: int, stride: int, padding: int, dilation: int = 1) -> Dim:
    """Size of a conv's or pool's output along an axis of size `n` (torch.nn.Conv2d's formula).

    >>> after_window(224, 7, 2, 3), after_window(Size("x", 2), 3, 1, 1)
    (112, Size(node='x', axis=2))
    """
    change = 2 * padding - dilation * (kernel - 1) - 1
    if isinstance(n, int):
        return (n + change) // stride + 1
    return n if (change, stride) == (-1, 1) else Size(f"({n.node}:{n.axis} {change:+d}) // {stride} + 1", 0)


@dataclass(frozen=True)
class Value:
    """A tensor with its channels along one axis.

    Attributes:
        labels: `[C]` int64, the variable of each channel; channels of one variable stay or go together.
        constant: `[C]` float64, what each channel holds at every place, NaN where that is not known.
        axis: of the channels, counted from the front where the shape is known, else -1.
        shape: the sizes, batch included; None where the number of axes is not known.
        flat: each channel stands for an unknown number of features, one after the other: [N, C * H * W].
    """

    labels: Tensor
    constant: Tensor
    axis: int
    shape: tuple[Dim, ...] | None
    flat: bool = False

    @property
    def rank(self) -> int | None:
        """Number of axes, None where not known."""
        return None if self.shape is None else len(self.shape)

    def holding(self, constant: Tensor) -> Value:
        """The same channels with other constants; infinities count as unknown."""
        return replace(self, constant=torch.where(constant.isfinite(), constant, UNKNOWN))

    def take(self, index: Tensor) -> Value:
        """The channels at `index`."""
        shape = self.shape and (*self.shape[: self.axis], len(index), *self.shape[self.axis + 1 :])
        return replace(self, labels=self.labels[index], constant=self.constant[index], shape=shape)

    def placed(self, axis: int, shape: tuple[Dim, ...]) -> Value:
        """The same channels along `axis` of a tensor of `shape`."""
        return replace(self, axis=axis, shape=shape)

    def is_channel_axis(self, axis: object) -> bool:
        """True where `axis`, of any sign, surely is the one of the channels."""
        if not isinstance(axis, int):
            return False
        return axis == self.axis if self.shape is None else axis % len(self.shape) == self.axis


@dataclass(frozen=True)
class Folded:
    """Channels over several axes, between the view that split them and the one that joins them again.

    Attributes:
        entry: the view that split them, and `value` what is known of what it reads.
        index: `[*sizes of axes]` int64, the channel of `value` at each place.
        axes: of the tensor, ascending, over which the channels lie.
        shape: the sizes of the tensor.
    """

    entry: fx.Node
    value: Value
    index: Tensor
    axes: tuple[int, ...]
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Parts:
    """The parts of `value` when it is taken apart along its channels: one tensor for each, without their axis."""

    value: Value


@dataclass(frozen=True)
class Stored:
    """A tensor of the model that the forward reads by name."""

    tensor: Tensor


@dataclass(frozen=True)
class Shape:
    """`x.shape` of a value `node` of which nothing else is known."""

    node: str


class Opaque:
    """Stands for a value of which nothing is known, among the arguments of an operation."""


OPAQUE = Opaque()
