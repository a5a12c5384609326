# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Dense convs of few input channels, such as a network's first: Triton kernels of their own.

    y = activation(conv(x, weight) + bias), or of it the largest of each window of a max pool

A library's conv is made for many channels, and three channels can be read by two or four bytes alone. So a first kernel
copies the images to four channels, with the zeros of the padding around them, and the weights likewise:

    x4        [N, H + 2 PH, WIDTH, 4]      WIDTH: what the last column reads, an even number
    weights4  [R, outputs, BK]             BK = 4 S, up to a power of two: a row of the kernel; zeros past its taps

Then the taps of one row of the kernel are one step of the reduction, neighbours in memory that are read eight bytes at
a time, and no step asks what lies inside of the image. Pixels past a row's taps are read as zeros, too: infinity times
a weight of zero would be NaN.
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
from fxdbsr.kernels.triton_pixels import pool_last, position

PIXELS = 128
WARPS = 4
STAGES = 1  # with more, copies of eight bytes to shared memory take longer than they hide
COPIED = 1024  # pixels, or weights, of a program that copies


@triton.jit
def widen_kernel(
    x_ptr,
    weight_ptr,
    x4_ptr,
    weights4_ptr,
    pixels,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    R: tl.constexpr,
    S: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    BK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK pixels of x4, which has `pixels`; the programs after those copy weights, `[O, R, S, C]` in memory."""
    copies = (pixels + BLOCK - 1) // BLOCK
    if tl.program_id(0) < copies:
        m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        c = tl.arange(0, 4)
        row = m // WIDTH
        image = row // HEIGHT
        h = row - image * HEIGHT - PH
        w = m - row * WIDTH - PW
        inside = (m < pixels) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        source = image * image_stride + h * row_stride + w * column_stride
        x_ptrs = x_ptr + source[:, None] + c[None, :] * channel_stride
        x = tl.load(x_ptrs, mask=inside[:, None] & (c < C)[None, :], other=0.0)
        tl.store(x4_ptr + m[:, None] * 4 + c[None, :], x, mask=(m < pixels)[:, None])
    else:
        i = (tl.program_id(0) - copies) * BLOCK + tl.arange(0, BLOCK)
        k = i % BK
        o = i // BK % LANES
        r = i // (BK * LANES)
        live = (r < R) & (o < O) & (k < 4 * S) & (k % 4 < C)
        weight = tl.load(weight_ptr + ((o * R + r) * S + k // 4) * C + k % 4, mask=live, other=0.0)
        tl.store(weights4_ptr + i, weight, mask=r < R)


@triton.jit
def stem_kernel(
    x4_ptr,
    weights4_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    pixels,
    slope,
    P: tl.constexpr,
    Q: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    R: tl.constexpr,
    S: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    POOL: tl.constexpr,
):
    """BM pixels by BN outputs; a step of BK products is one row of the kernel."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    o = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    image, p, q = position(tl.minimum(m, pixels - 1), P, Q, POOL)
    first = ((image * HEIGHT + p * SH) * WIDTH + q * SW) * 4
    offset = tl.max_contiguous(tl.multiple_of(first[:, None] + k[None, :], [1, 4]), [1, 4])
    taps = tl.max_constancy(k < 4 * S, 4)[None, :]
    x_ptrs = x4_ptr + offset
    weight_ptrs = weights4_ptr + (o[:, None] * BK + k[None, :])
    acc = tl.full((BN, BM), 0.0, tl.float32)
    for r in range(R):
        x = tl.load(x_ptrs + r * (DH * WIDTH * 4), mask=taps, other=0.0)
        w = tl.load(weight_ptrs + r * (LANES * BK))
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
    wide = prod(wide_size(input.shape[2:], weight.shape[2:], stride, padding, size))
    if input.shape[0] * max(4 * wide, outputs * prod(size)) >= 2**31:
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
    outputs, _, *kernel = weight.shape
    spatial = output_size(input.shape[2:], kernel, stride, padding, dilation)
    output = empty_output(input, outputs, [size // pool for size in spatial])
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    call = Call(input, bias, None, output, kernel, stride, padding, dilation, activation, negative_slope, pool)
    constants = call.constants()
    lanes = min(64, max(16, triton.next_power_of_2(outputs)))
    depth = max(16, triton.next_power_of_2(4 * kernel[1]))
    height, width = wide_size(input.shape[2:], kernel, stride, padding, spatial)
    sizes = {"HEIGHT": height, "WIDTH": width, "LANES": triton.cdiv(outputs, lanes) * lanes, "BK": depth}
    x4 = input.new_empty(input.shape[0] * height * width * 4)
    weights4 = input.new_empty(kernel[0] * sizes["LANES"] * depth)
    pixels = x4.numel() // 4
    with torch.cuda.device_of(input):
        widen_kernel[(triton.cdiv(pixels, COPIED) + triton.cdiv(weights4.numel(), COPIED),)](
            input,
            weight,
            x4,
            weights4,
            pixels,
            *input.stride(),
            **{name: constants[name] for name in ("H", "W", "C", "O", "R", "S", "PH", "PW")},
            **sizes,
            BLOCK=COPIED,
        )
        stem_kernel[(triton.cdiv(call.pixels, PIXELS), sizes["LANES"] // lanes)](
            x4,
            weights4,
            *call.epilogue(),
            call.pixels,
            float(negative_slope),
            **{name: constants[name] for name in ("P", "Q", "O", "R", "S", "SH", "SW", "DH")},
            **{name: constants[name] for name in ("HAS_BIAS", "HAS_RESIDUAL", "ACTIVATION")},
            **sizes,
            BM=PIXELS,
            BN=lanes,
            POOL=pool,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return output


def wide_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], spatial: Sequence[int]
) -> tuple[int, int]:
    """Height and width of the images with their padding, and as wide as whole steps read them."""
    read = (spatial[1] - 1) * stride[1] + max(16, triton.next_power_of_2(4 * kernel[1])) // 4
    width = max(size[1] + 2 * padding[1], read)
    return size[0] + 2 * padding[0], width + width % 2
