# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The end of every Triton conv: bias, residual and activation in float32, then one store.

    y[m, o] = activation(acc[m, o] + bias[o] + residual[m, o])

`m` counts output pixels (batch, row, column), `o` output channels; y and residual are `[pixels, O]`, channels
last. With a split reduction the tiles leave partial sums `[SPLITS, pixels, O]` (float32) and `reduce_kernel`
adds them in the order of the splits, so that the result does not depend on which tile finished first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxdbsr.kernels.triton_call import Call

BLOCK = 1024


@triton.jit
def activate(y, ACTIVATION: tl.constexpr, slope):
    """`reference.activate` on a tile; every comparison with NaN is false, which lets NaN through."""
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)
    elif ACTIVATION == "relu6":
        y = tl.where(y < 0, 0.0, tl.where(y > 6, 6.0, y))
    elif ACTIVATION == "silu":
        y = y / (1 + tl.exp(-y))
    elif ACTIVATION == "hardswish":
        gate = y + 3
        y = y * tl.where(gate < 0, 0.0, tl.where(gate > 6, 6.0, gate)) / 6
    elif ACTIVATION == "leaky_relu":
        y = tl.where(y < 0, y * slope, y)
    elif ACTIVATION == "sigmoid":
        y = 1 / (1 + tl.exp(-y))
    return y


@triton.jit
def finish(acc, index, live, bias, residual_ptr, y_ptr, slope, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr):
    """Store `activation(acc + bias + residual)` at `index` where `live`; `bias` broadcasts against `acc`."""
    acc += bias
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + index, mask=live, other=0.0).to(tl.float32)
    acc = activate(acc, ACTIVATION, slope)
    tl.store(y_ptr + index, acc.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def finish_lanes(
    acc,
    m,
    pixels,
    lanes_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    slope,
    O: tl.constexpr,  # noqa: E741
    BN: tl.constexpr,
    RUN: tl.constexpr,
    FULL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Finish `acc [BM, BN]`: lane n holds output channel `lanes_ptr[n]`, or nothing where that is O or more.

    RUN lanes in a row are neighbouring channels, the first one a multiple of RUN; FULL: every lane is a channel.
    PARTIAL: store `acc` as it is, for `reduce_kernel`.
    """
    o = tl.load(lanes_ptr + tl.arange(0, BN))
    o = tl.max_contiguous(tl.multiple_of(o, RUN), RUN)
    index = m[:, None] * O + o[None, :]
    live = (m < pixels)[:, None]
    if not FULL:
        live = live & tl.max_constancy(o < O, RUN)[None, :]
    if PARTIAL:
        tl.store(y_ptr + index, acc, mask=live)
    else:
        if HAS_BIAS:
            bias = tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
        else:
            bias = tl.full((1, BN), 0.0, tl.float32)
        finish(acc, index, live, bias, residual_ptr, y_ptr, slope, HAS_RESIDUAL, ACTIVATION)


@triton.jit
def reduce_kernel(
    partial_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    elements,
    slope,
    O: tl.constexpr,  # noqa: E741
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the partial sums of `elements = pixels * O` outputs in the order of the splits, and finish them.

    One "partial" sum may be y itself.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = index < elements
    acc = tl.load(partial_ptr + index, mask=live, other=0.0).to(tl.float32)
    for _ in range(1, SPLITS):
        partial_ptr += elements
        acc += tl.load(partial_ptr + index, mask=live, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + index % O, mask=live, other=0.0).to(tl.float32)
    else:
        bias = tl.full((BLOCK,), 0.0, tl.float32)
    finish(acc, index, live, bias, residual_ptr, y_ptr, slope, HAS_RESIDUAL, ACTIVATION)


def reduce(call: Call, partial: Tensor) -> None:
    """Fill `call.output` from `partial`: `[SPLITS, pixels * O]` (float32), or the output itself."""
    elements = call.output.numel()
    reduce_kernel[(triton.cdiv(elements, BLOCK),)](
        partial,
        *call.epilogue(),
        elements,
        float(call.negative_slope),
        O=call.output.shape[1],
        SPLITS=partial.numel() // elements,
        HAS_BIAS=call.bias is not None,
        HAS_RESIDUAL=call.residual is not None,
        ACTIVATION=call.activation,
        BLOCK=BLOCK,
    )


def why_not_in_place(y: Tensor, residual: Tensor | None) -> str | None:
    """A sentence that says why `finish_in_place` cannot finish `y`; None where it can."""
    if y.dim() != 4 or not y.is_contiguous(memory_format=torch.channels_last) or not 0 < y.numel() < 2**31:
        return "channels lie last, of fewer than 2**31 numbers"
    if y.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"float16, bfloat16 and float32, not {str(y.dtype).removeprefix('torch.')}"
    if residual is not None and (residual.shape != y.shape or residual.dtype != y.dtype):
        return "a residual has the shape and the dtype of the output"
    return None


def finish_in_place(
    y: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, negative_slope: float
) -> Tensor:
    """`activation(y + bias + residual)`, written over `y [N, O, P, Q]`, channels last."""
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    one = (1, 1)
    with torch.cuda.device_of(y):
        reduce(Call(y, bias, residual, y, one, one, (0, 0), one, activation, negative_slope), y)
    return y
