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
from fxdbsr.kernels.plain import is_transformed


class _ScaleBlocks(torch.autograd.Function):
    """`grid.scale(weight, s)`; the gradient of the scale is one sum over each block of weight * gradient.

    The gradient of the weight takes the place of the gradient that arrives. Nobody else may see that one, as is so with
    the fresh result of a conv's or linear layer's backward; where a graph of the backward is wanted it is left alone.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, mask: Tensor, grid: BlockGrid, form: Form) -> Tensor:
        s = effective_scale(scale, mask, form)
        ctx.save_for_backward(weight, scale, mask, s)
        ctx.grid, ctx.form = grid, form
        return grid.scale(weight, s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        weight, scale, mask, s = ctx.saved_tensors
        (grad,) = grads
        of_scale = ctx.grid.block_sum(grad * weight) * mask if ctx.needs_input_grad[1] else None
        of_weight = None
        if ctx.needs_input_grad[0]:
            if torch.is_grad_enabled():
                of_weight = ctx.grid.scale(grad, effective_scale(scale, mask, ctx.form))
            else:
                of_weight = ctx.grid.scale_(grad, s)
        return of_weight, of_scale, None, None, None


def scale_blocks(
    weight: Tensor, scale: Tensor, mask: Tensor, grid: BlockGrid, form: Form, for_conv: bool = True
) -> Tensor:
    """`expand(s) * weight`, shaped like the weight; differentiable in weight and scale.

    On a CPU, whose time is memory's, the backward saves a copy of the weight where one conv or linear layer is all that
    reads the result (`for_conv`). On other devices the host's time counts, and torch's own backward is launched sooner
    than one written in Python. Graphs and the transforms of torch.func take what is differentiated by torch.
    """
    if for_conv and weight.is_cpu and not torch.compiler.is_compiling() and not is_transformed():
        scaled: Tensor = _ScaleBlocks.apply(weight, scale, mask, grid, form)
        return scaled
    if form == "clamp":
        s = (scale.clamp(0, 1).detach() + (scale - scale.detach())) * mask
    else:
        s = effective_scale(scale, mask, form)
    return grid.scale(weight, s)


def effective_scale(scale: Tensor, mask: Tensor, form: Form) -> Tensor:
    """What multiplies the blocks, `[rows, columns]`: zero where the mask is off. `scale_blocks` has its gradient."""
    if form == "mask":
        return mask.to(scale.dtype)
    return (scale if form == "product" else scale.clamp(0, 1)) * mask


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
