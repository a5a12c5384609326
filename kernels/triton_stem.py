# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Dense convs of few input channels, such as a network's first: a Triton kernel of their own.

    y = activation(conv(x, weight) + bias), or of it the largest of each window of a max pool

A library's conv is made for many channels. Here the taps of one row of the kernel and their channels, S*C numbers, are
one step of the reduction: channels last, they are neighbours in memory. What lies beyond them, up to a power of two, is
masked on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxdbsr.kernels.geometry import empty_output, output_size
from fxdbsr.kernels.triton_call import Call
from fxdbsr.kernels.triton_device import device_of
from fxdbsr.kernels.triton_epilogue import finish
from fxdbsr.kernels.triton_pixels import pool_last, position
from fxdbsr.kernels.triton_plan import power_of_two_divisor

PIXELS = 128
WARPS = {"cuda:90": 4}  # elsewhere both operands lie in registers, of which four warps have too few


@triton.jit
def stem_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    pixels,
    slope,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    R: tl.constexpr,
    S: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    VEC: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    POOL: tl.constexpr,
):
    """BM pixels by BN outputs; weight is [O, R, S, C] in memory, a step of BK products one row of the kernel.

    VEC neighbours are read at a time, from SHIFT numbers before the first, where addresses are multiples of VEC.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    o = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK) - SHIFT
    taps = (k >= 0) & (k < S * C)
    pixel = tl.minimum(m, pixels - 1)
    image, p, q = position(pixel, P, Q, POOL)
    h = p * SH - PH
    column = (q * (SW * C) - PW * C)[:, None] + k[None, :]  # in the row of the image
    inside = tl.max_constancy((column >= 0) & (column < W * C) & (k < S * C)[None, :], [1, VEC])
    offset = tl.max_contiguous(tl.multiple_of((image * H + h)[:, None] * (W * C) + column, [1, VEC]), [1, VEC])
    x_ptrs = x_ptr + offset
    weight_ptrs = weight_ptr + (o[:, None] * (R * S * C) + k[None, :])
    acc = tl.full((BN, BM), 0.0, tl.float32)
    for r in tl.static_range(R):
        row = (h + r * DH >= 0) & (h + r * DH < H)
        x = tl.load(x_ptrs + r * (DH * W * C), mask=inside & row[:, None], other=0.0)
        x = tl.where(taps[None, :], x, 0.0)
        w = tl.load(weight_ptrs + r * (S * C), mask=(o < O)[:, None] & taps[None, :], other=0.0)
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    if POOL > 1:
        acc = pool_last(acc, BN, BM, POOL)
        m = tl.program_id(0) * (BM // (POOL * POOL)) + tl.arange(0, BM // (POOL * POOL))
        pixels = pixels // (POOL * POOL)
    acc = tl.trans(acc)
    index = m[:, None] * O + tl.max_contiguous(tl.multiple_of(o, BN), BN)[None, :]
    live = (m < pixels)[:, None]
    if O % BN:
        live = live & (o < O)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    else:
        bias = tl.full((1, BN), 0.0, tl.float32)
    finish(acc, index, live, bias, residual_ptr, y_ptr, slope, HAS_RESIDUAL, ACTIVATION)


def why_not(
    input: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    """A sentence that says why this kernel does not run the conv; None where it does."""
    outputs, channels = weight.shape[:2]
    if input.dim() != 4 or weight.dim() != 4:
        return "it runs 2-d convs of batches"
    if input.dtype not in (torch.float16, torch.bfloat16) or weight.dtype != input.dtype:
        return f"it runs float16 and bfloat16, not {str(input.dtype).removeprefix('torch.')}"
    if channels > 4 or groups != 1 or max(weight.shape[2:]) > 7 or dilation[1] != 1:
        return "it runs up to 4 channels, one group, up to 7 taps an axis, and no dilation along rows"
    if residual is not None:
        return "it adds no residual"
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    if input.shape[1] != channels or min(size) < 1:
        return "torch says what is wrong with it"
    if max(input.numel(), input.shape[0] * outputs * prod(size)) >= 2**31:
        return "it reads and writes fewer than 2**31 numbers"
    return None


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    negative_slope: float,
    pool: int = 1,
) -> Tensor:
    """`[N, C, H, W]` to `[N, O, P // pool, Q // pool]`, channels last; of what `why_not` lets pass."""
    outputs, channels, *kernel = weight.shape
    spatial = output_size(input.shape[2:], kernel, stride, padding, dilation)
    output = empty_output(input, outputs, [size // pool for size in spatial])
    input = input.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    call = Call(input, bias, None, output, kernel, stride, padding, dilation, activation, negative_slope, pool)
    lanes = min(64, max(16, triton.next_power_of_2(outputs)))
    width = power_of_two_divisor(gcd(stride[1] * channels, input.shape[3] * channels), 8)
    shift = -padding[1] * channels % width
    with torch.cuda.device_of(input):
        stem_kernel[(triton.cdiv(call.pixels, PIXELS), triton.cdiv(outputs, lanes))](
            input,
            weight,
            *call.epilogue(),
            call.pixels,
            float(negative_slope),
            **call.constants(),
            BM=PIXELS,
            BN=lanes,
            BK=max(16, triton.next_power_of_2(kernel[1] * channels + shift)),
            VEC=width,
            SHIFT=shift,
            POOL=pool,
            num_warps=WARPS.get(device_of(input.device).target, 8),
        )
    return output
