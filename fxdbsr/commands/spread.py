"""Random masks for timing, which leave no channel dead."""

from __future__ import annotations

import torch
from torch import Tensor


def spread_mask(shape: tuple[int, int], sparsity: float, generator: torch.Generator) -> Tensor:
    """A random bool mask that keeps its blocks evenly over rows and columns, at least one in each.

    Masks drawn block by block leave channels of which no block is kept; `convert` removes those, and what they
    feed, and a comparison would flatter the converted model. A narrow layer therefore keeps more than it is asked to.
    """
    rows, columns = shape
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    diagonal = (j - i) % columns if rows >= columns else (i - j) % rows
    order = (diagonal + torch.rand(shape, generator=generator)).flatten().argsort()
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[order[: max(rows, columns, round((1 - sparsity) * rows * columns))]] = True
    i, j = (torch.randperm(size, generator=generator) for size in shape)
    return mask.view(shape)[i][:, j]
