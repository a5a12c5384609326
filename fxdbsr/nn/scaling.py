"""Block scales as arithmetic: what multiplies the blocks of a weight, with its gradient, and in which precision.

    W_s = expand(s) * W       s = scale * mask                  form "product"
                              s = clamp(scale, 0, 1) * mask     form "clamp"
                              s = mask                          form "mask"

In the form "clamp", of the method's authors, the gradient passes straight through the clamp: the scale gets
`dL/ds = sum over the block of weight * dL/dW_s`, also where it is clamped. In the form "mask" the scale stays one
and is not trained. The scale is never less precise than float32, whatever the weight: steps that bring it from 1 to
0 in thousands of pieces are lost in half precision.
Source: Vooturi, Varma, Kothapalli, Dynamic Block Sparse Reparameterization of Convolutional Neural Networks,
ICCV Workshops 2019, and its published code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fxdbsr.blocks import BlockGrid
from fxdbsr.config import Form


class _ClampStraightThrough(torch.autograd.Function):
    """clamp(scale, 0, 1) whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor) -> Tensor:
        return scale.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _ScaleBlocks(torch.autograd.Function):
    """`grid.scale(weight, scale)`; the gradient of the scale is one sum over each block of weight * gradient.

    The gradient of the weight takes the place of the gradient that arrives. That is the fresh result of a conv's
    or linear layer's backward, which alone reads the scaled weight, and nobody else sees it; where a graph of the
    backward is wanted it is left alone.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, grid: BlockGrid) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.grid = grid
        return grid.scale(weight, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, scale = ctx.saved_tensors
        (grad,) = grads
        of_scale = ctx.grid.block_sum(grad * weight) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_scale, None
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return ctx.grid.scale(grad, scale), of_scale, None
        return ctx.grid.scale_(grad, scale), of_scale, None


def scale_blocks(weight: Tensor, scale: Tensor, grid: BlockGrid) -> Tensor:
    """`expand(scale) * weight`, shaped like the weight; differentiable in both."""
    scaled: Tensor = _ScaleBlocks.apply(weight, scale, grid)
    return scaled


def effective_scale(scale: Tensor, mask: Tensor, form: Form) -> Tensor:
    """What multiplies the blocks, `[rows, columns]`: zero where the mask is off."""
    if form == "mask":
        return mask.to(scale.dtype)
    s = scale if form == "product" else _ClampStraightThrough.apply(scale)
    return s * mask


def ones_like_scales(grid: BlockGrid, form: Form, weight: Tensor) -> nn.Parameter:
    """New scales `[rows, columns]` for `weight`, float32 or, for such a weight, float64; trainable but for "mask"."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return nn.Parameter(torch.ones(grid.shape, dtype=dtype, device=weight.device), requires_grad=form != "mask")


def keeping_float32(fn: Callable[[Tensor], Tensor], scales: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` of a module's `_apply`, that moves `scales` where it would, but leaves them float32 where it halves."""
    kept = {id(tensor) for scale in scales for tensor in (scale, scale.grad) if tensor is not None}

    def apply(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if id(tensor) in kept and result.dtype in (torch.float16, torch.bfloat16):
            return tensor.to(result.device, torch.float32)
        return result

    return apply
