# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Dense convs of 4, 8 or 16 channels a group, such as ResNeXt's: a Triton kernel of their own.

    y[m, o] = activation(sum over taps t and channels j of o's group of x[pixel of m and t, j] * w[o, t, j] + bias[o])

`grouped_kernel` multiplies 32 channels by block-diagonal weights on the matrix unit, straight from registers. A thread
of mma.sync holds four channels of a product's sixteen, k = 2j, 2j+1, 2j+8, 2j+9 for its place j of four. Here it loads
eight neighbours, c = 8j to 8j+7, in one read of 16 bytes and takes each four of them for its part of one product: a sum
does not depend on the order of its terms, as long as the weights lie in the same order. With groups of four, a product
so holds four whole groups and has 16 outputs (HALVES = 2); wider groups need all 32 (HALVES = 1). Outputs are put in an
order in which a thread stores eight neighbours as well, and each warp has pixels of its own, so that neither operands
nor sums go through shared memory. All taps of a program read the same lines of L1.

Zeros outside of the groups would make NaN of another group's infinity. Where a sum is not finite, a program therefore
computes all of its sums again, group by group: slow, but right, and rare.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxdbsr.kernels.geometry import empty_output, output_size
from fxdbsr.kernels.triton_call import Call
from fxdbsr.kernels.triton_epilogue import finish
from fxdbsr.kernels.triton_pixels import position, tap_bits

ROWS = 32  # pixels of a warp
WARPS = 1


@triton.jit
def rows_by_warp(tile, WARPS: tl.constexpr, ROWS: tl.constexpr, HALVES: tl.constexpr):
    """`[WARPS * ROWS, 32]`, as it is read, to operands `[HALVES * WARPS, ROWS, 32 / HALVES]` of a product.

    Of runs of eight rows, each warp reads one in turn; of eight channels, each thread.
    """
    parts = tl.reshape(tile, (ROWS // 8, WARPS, 8, 4, HALVES, 4 // HALVES, 2))
    parts = tl.permute(parts, (4, 1, 0, 2, 5, 3, 6))
    return tl.reshape(parts, (HALVES * WARPS, ROWS, 32 // HALVES))


@triton.jit
def rows_in_order(acc, WARPS: tl.constexpr, ROWS: tl.constexpr, HALVES: tl.constexpr):
    """Sums `[HALVES * WARPS, ROWS, 32 / HALVES]` to `[WARPS * ROWS, 32]`, the inverse of `rows_by_warp`."""
    parts = tl.reshape(acc, (HALVES, WARPS, ROWS // 8, 8, 4 // HALVES, 4, 2))
    parts = tl.permute(parts, (2, 1, 3, 5, 0, 4, 6))
    return tl.reshape(parts, (WARPS * ROWS, 32))


@triton.jit
def add(a, b):
    """A sum, for `tl.reduce`."""
    return a + b


@triton.jit
def sums_by_group(
    x_ptrs,
    weight_ptr,
    bits,
    W: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    GROUP: tl.constexpr,
    HALVES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums `[ROWS, 32]` in which no group meets another; x_ptrs at tap (0, 0) of the pixels, weights as `spread`."""
    o = tl.arange(0, 32)
    first = o // GROUP * GROUP
    row = (o % 8 // 2) % (4 // HALVES) * 8 + o // 8 * 2 + o % 2  # of the weights
    acc = tl.full((ROWS, 32), 0.0, tl.float32)
    for r in range(R):
        for s in range(S):
            inside = (bits >> r) & (bits >> (8 + s)) & 1
            for j in range(GROUP):
                offset = (r * (DH * W) + s * DW) * C + j
                x = tl.load(x_ptrs[:, None] + (first + offset)[None, :], mask=(inside != 0)[:, None], other=0.0)
                w = tl.load(weight_ptr + (r * S + s) * (1024 // HALVES) + row * 32 + first + j)
                acc += x.to(tl.float32) * w.to(tl.float32)[None, :]
    return acc


@triton.jit
def grouped_kernel(
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
    GROUP: tl.constexpr,
    HALVES: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """32 channels of ROWS pixels for each of WARPS warps; weights as `spread` lays them."""
    part = tl.program_id(0) % (C // 32)
    m = tl.program_id(0) // (C // 32) * (WARPS * ROWS) + tl.arange(0, WARPS * ROWS)
    image, p, q = position(tl.minimum(m, pixels - 1), P, Q, 1)
    h = p * SH - PH
    w = q * SW - PW
    bits = tap_bits(h, w, H, W, R, S, DH, DW)
    k = part * 32 + tl.arange(0, 32)
    base = ((image * H + h) * W + w) * C
    x_ptrs = x_ptr + (base[:, None] + k[None, :])
    i = tl.arange(0, WARPS * (32 // HALVES))
    row = i // (8 * WARPS) * 8 + i % 8  # all warps read the same weights
    weight_ptr += part * (R * S * (1024 // HALVES))
    weight_ptrs = weight_ptr + (row[:, None] * 32 + tl.arange(0, 32)[None, :])
    acc = tl.full((HALVES * WARPS, ROWS, 32 // HALVES), 0.0, tl.float32)
    for r in tl.static_range(R):
        for s in tl.static_range(S):
            inside = ((bits >> r) & (bits >> (8 + s)) & 1) != 0
            x = tl.load(x_ptrs + (r * (DH * W) + s * DW) * C, mask=inside[:, None], other=0.0)
            taps = tl.load(weight_ptrs + (r * S + s) * (1024 // HALVES))
            x = rows_by_warp(x, WARPS, ROWS, HALVES)
            taps = rows_by_warp(taps, WARPS, 32 // HALVES, HALVES)
            acc = tl.dot(x, tl.permute(taps, (0, 2, 1)), acc)
    acc = rows_in_order(acc, WARPS, ROWS, HALVES)
    bias = tl.load(bias_ptr + k).to(tl.float32)[None, :] if HAS_BIAS else tl.full((1, 32), 0.0, tl.float32)
    index = m[:, None] * O + k[None, :]
    live = (m < pixels)[:, None]
    if tl.reduce(acc * 0.0, None, add) == 0.0:
        finish(acc, index, live, bias, residual_ptr, y_ptr, slope, HAS_RESIDUAL, ACTIVATION)
    else:  # NaN, since a sum is not finite
        acc = sums_by_group(
            x_ptr + (part * 32 + base), weight_ptr, bits, W, C, R, S, DH, DW, GROUP, HALVES, WARPS * ROWS
        )
        finish(acc, index, live, bias, residual_ptr, y_ptr, slope, HAS_RESIDUAL, ACTIVATION)


def spread(weight: Tensor, groups: int) -> Tensor:
    """`[O, C / groups, R, S]` as `grouped_kernel` reads it: `[C / 32, R, S, outputs, 32]`, zeros outside of the groups.

    With groups of four, a row has the weights of two outputs: their groups alternate, one product takes each.
    """
    outputs, width, *kernel = weight.shape
    halves = 2 if width == 4 else 1
    flat = weight.reshape(groups, width, width, *kernel).movedim((3, 4), (0, 1))  # [R, S, group, output, input]
    full = torch.zeros(*kernel, outputs // 32, 32, 32, dtype=weight.dtype, device=weight.device)
    within = torch.arange(32, device=weight.device).view(32 // width, width)
    tiles = flat.unflatten(2, (outputs // 32, 32 // width))
    full[:, :, :, within[:, :, None], within[:, None, :]] = tiles
    # an output is 8j + e with e = (half, n, bit), a row of a half's weights (n, j, bit); an input 8j + e as well
    parts = full.view(*kernel, outputs // 32, 4, halves, 4 // halves, 2, 4, halves, 8 // halves)
    own = torch.stack([parts[:, :, :, :, half, :, :, :, half] for half in range(halves)], -2)
    return own.permute(2, 0, 1, 4, 3, 5, 6, 7, 8).reshape(outputs // 32, *kernel, 32 // halves, 32).contiguous()


def why_not_weight(weight: Tensor, groups: int) -> str | None:
    """A sentence that says why this kernel runs no conv with that weight; None where it may."""
    if weight.dim() != 4:
        return "it runs 2-d convs"
    outputs, width = weight.shape[:2]
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"it runs float16 and bfloat16, not {str(weight.dtype).removeprefix('torch.')}"
    if width not in (4, 8, 16) or outputs != width * groups or outputs % 32:
        return "it runs groups of 4, 8 or 16 channels, as many in as out, which are multiples of 32 together"
    return "it runs up to 7 taps an axis" if max(weight.shape[2:]) > 7 else None


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
    reason = why_not_weight(weight, groups)
    if reason is not None:
        return reason
    if input.dim() != 4 or weight.dtype != input.dtype:
        return "it runs 2-d convs of batches, in the dtype of the weight"
    outputs = weight.shape[0]
    if residual is not None:
        return "it adds no residual"
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    if input.shape[1] != outputs or min(size) < 1:
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
    groups: int,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """`[N, C, H, W]` to `[N, C, P, Q]`, channels last; of what `why_not` lets pass, with weights by `spread`."""
    kernel = weight.shape[1:3]
    output = empty_output(input, input.shape[1], output_size(input.shape[2:], kernel, stride, padding, dilation))
    input = input.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    call = Call(input, bias, None, output, kernel, stride, padding, dilation, activation, negative_slope)
    channels = input.shape[1]
    with torch.cuda.device_of(input):
        grouped_kernel[(triton.cdiv(call.pixels, ROWS * WARPS) * (channels // 32),)](
            input,
            weight,
            *call.epilogue(),
            call.pixels,
            float(negative_slope),
            **call.constants(),
            GROUP=channels // groups,
            HALVES=2 if channels == 4 * groups else 1,
            ROWS=ROWS,
            WARPS=WARPS,
            num_warps=WARPS,
            num_stages=1,
        )
    return output
