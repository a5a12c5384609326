"""Max pooling in eval mode: torch's, or on a GPU, channels last, a kernel of ours (`triton_pool`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fxdbsr.kernels.plain import is_plain, runs_triton


def max_pool2d(
    input: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """`F.max_pool2d` of `[N, C, H, W]` or `[C, H, W]`, whose sizes are rounded down."""
    if is_plain(input) and input.is_cuda and runs_triton(input.device):
        from fxdbsr.kernels import triton_pool

        if triton_pool.why_not(input, kernel, stride, padding, dilation) is None:
            return triton_pool.max_pool(input, kernel, stride, padding, dilation)
    return F.max_pool2d(input, [*kernel], [*stride], [*padding], [*dilation])


def max_pool(input: Tensor, side: int) -> Tensor:
    """The largest of each window of `side` by `side`, side by side; `input` itself where that is 1."""
    return input if side == 1 else max_pool2d(input, (side, side), (side, side), (0, 0), (1, 1))
