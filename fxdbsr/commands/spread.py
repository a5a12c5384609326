"""Random masks for timing, which leave as few channels dead as they can."""

from __future__ import annotations

import torch
from torch import Tensor


def spread_mask(shape: tuple[int, int], sparsity: float, generator: torch.Generator, cover: bool = False) -> Tensor:
    """A random bool mask that keeps its blocks evenly over rows and columns, at least one.

    Masks drawn block by block leave channels of which no block is kept; `convert` removes those, and what they
    feed, and a comparison would flatter the converted model. Where there are fewer blocks to keep than rows or
    columns some channels die here, too.

    Args:
        cover: keep one block in each row and column, whatever the sparsity.
    """
    rows, columns = shape
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    diagonal = (j - i) % columns if rows >= columns else (i - j) % rows
    order = (diagonal + torch.rand(shape, generator=generator)).flatten().argsort()
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    least = max(rows, columns) if cover else 1
    mask[order[: max(least, round((1 - sparsity) * rows * columns))]] = True
    i, j = (torch.randperm(size, generator=generator) for size in shape)
    return mask.view(shape)[i][:, j]
