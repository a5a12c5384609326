"""Sizes that follow from a conv's arguments, shared by every engine."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

ACTIVATIONS = ("none", "relu", "relu6", "silu", "hardswish", "leaky_relu", "sigmoid")

RISING = ("none", "relu", "relu6", "leaky_relu", "sigmoid")  # never smaller for a larger number: maxima pass them


def passes_maxima(activation: str, negative_slope: float) -> bool:
    """True where the largest of some numbers stays the largest through the activation."""
    return activation in RISING and (activation != "leaky_relu" or negative_slope >= 0)


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """Spatial size of a conv's output for spatial input `size` (torch.nn.Conv2d's formula).

    >>> output_size((224, 224), (7, 7), (2, 2), (3, 3), (1, 1))
    (112, 112)
    """
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    )


def empty_output(input: Tensor, out_channels: int, spatial: Sequence[int]) -> Tensor:
    """Uninitialised `[N, out_channels, *spatial]`, channels last in memory, dtype and device of `input`."""
    order = (0, len(spatial) + 1, *range(1, len(spatial) + 1))
    flat = torch.empty((input.shape[0], *spatial, out_channels), dtype=input.dtype, device=input.device)
    return flat.permute(order)


def packed_macs(values_shape: Sequence[int], batch: int, spatial: Sequence[int]) -> int:
    """MACs of a conv over `nnz` packed blocks `values_shape = (nnz, BO, BC, *kernel)`, padding included."""
    return prod(values_shape) * batch * prod(spatial)
