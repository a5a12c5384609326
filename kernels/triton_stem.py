# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Dense convs of few input channels, such as a network's first: a Triton kernel of their own.

    y = activation(conv(x, weight) + bias), or of it the largest of each window of a max pool

A library's conv is made for many channels. Here the images are first copied to where a pixel has four channels and the
padding around them (`triton_pad`). The taps of one row of the kernel and their channels, S*4 numbers, are then
neighbours in memory, and one step of the reduction. What lies beyond them, up to a power of two, is not read.

A program keeps the weights in shared memory and computes one tile of TH by TW pixels after the other. Where three tiles
fit in there as well, the next two are copied meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxdbsr.kernels.geometry import empty_output, output_size, passes_maxima
from fxdbsr.kernels.pool import max_pool
from fxdbsr.kernels.triton_call import Call
from fxdbsr.kernels.triton_device import device_of
from fxdbsr.kernels.triton_epilogue import finish
from fxdbsr.kernels.triton_pad import CHANNELS, pad
from fxdbsr.kernels.triton_pixels import larger

TILES = ((8, 16), (4, 32), (16, 8))  # pixels; the rows and columns of a tile hold whole windows
AHEAD = 64  # products of a pixel up to which three tiles fit in shared memory
WARPS = {"cuda:90": 4}  # elsewhere both operands lie in registers, of which four warps have too few
LEAST = {"cuda:90": 64}  # outputs of which the matrix unit takes the weights from shared memory; 16 elsewhere
PROGRAMS = 4  # that one multiprocessor runs at a time


@triton.jit
def largest(acc, OUTPUTS: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, POOL: tl.constexpr):
    """The largest of each window of a tile: `acc [OUTPUTS, TH * TW]` to `[OUTPUTS, TH * TW / POOL**2]`."""
    windows = tl.reshape(acc, (OUTPUTS, TH // POOL, POOL, TW // POOL, POOL))
    windows = tl.reduce(tl.reduce(windows, 4, larger), 2, larger)
    return tl.reshape(windows, (OUTPUTS, TH * TW // (POOL * POOL)))


@triton.jit
def stem_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    tiles,
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
    TH: tl.constexpr,
    TW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    POOL: tl.constexpr,
):
    """Tiles of TH * TW pixels by BN outputs; x is `[N, H + 2 * PH, W + 2 * PW, 4]`, weight `[outputs, R, BK]`.

    Tiles reach past the pixels of an image, and read what lies there: of the next row, or of the next image.
    """
    down: tl.constexpr = (P + TH - 1) // TH
    across: tl.constexpr = (Q + TW - 1) // TW
    columns: tl.constexpr = W + 2 * PW
    rows: tl.constexpr = H + 2 * PH
    o = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    m = tl.arange(0, TH * TW)
    window = tl.arange(0, TH * TW // (POOL * POOL))
    inside = (m // TW * (SH * columns) + m % TW * SW)[:, None] * 4 + k[None, :]
    taps = (k < S * 4)[None, :]  # weights of zero would not do: what lies beyond the taps may be infinite
    weights = ()
    for r in tl.static_range(R):  # Triton compiles no starred expression
        weight = tl.load(weight_ptr + o[:, None] * (R * BK) + (r * BK + k)[None, :])
        weights = weights + (weight,)  # type: ignore[assignment]  # noqa: RUF005
    if HAS_BIAS:
        bias = tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    else:
        bias = tl.full((1, BN), 0.0, tl.float32)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        image = tile // (down * across)
        top = tile // across % down * TH
        left = tile % across * TW
        x_ptrs = x_ptr + ((image * rows + top * SH) * columns + left * SW) * 4 + inside
        acc = tl.full((BN, TH * TW), 0.0, tl.float32)
        for r in tl.static_range(R):
            x = tl.load(x_ptrs + r * (DH * columns * 4), mask=taps, other=0.0)
            acc = tl.dot(weights[r], tl.trans(x), acc, input_precision="ieee")
        if POOL > 1:
            acc = largest(acc, BN, TH, TW, POOL)
        p = top // POOL + window // (TW // POOL)
        q = left // POOL + window % (TW // POOL)
        live = ((p < P // POOL) & (q < Q // POOL))[:, None]
        if O % BN:
            live = live & (o < O)[None, :]
        index = ((image * (P // POOL) + p) * (Q // POOL) + q)[:, None] * O
        index = index + tl.max_contiguous(tl.multiple_of(o, BN), BN)[None, :]
        finish(tl.trans(acc), index, live, bias, residual_ptr, y_ptr, slope, HAS_RESIDUAL, ACTIVATION)


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
    copied = CHANNELS * pixels_read(input, weight.shape[2:], stride, padding, dilation, size)
    if max(copied, input.shape[0] * outputs * prod(size)) >= 2**31:
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
    inside = pool if pool in (2, 4) and passes_maxima(activation, negative_slope) else 1
    output = empty_output(input, outputs, [size // inside for size in spatial])
    bias = None if bias is None else bias.contiguous()
    call = Call(input, bias, None, output, kernel, stride, padding, dilation, activation, negative_slope, inside)
    constants = call.constants()
    height, width = tile_of(spatial)
    device = device_of(input.device)
    lanes = min(64, max(LEAST.get(device.target, 16), triton.next_power_of_2(outputs)))
    depth = max(16, triton.next_power_of_2(kernel[1] * CHANNELS))
    parts = triton.cdiv(outputs, lanes)
    tiles = input.shape[0] * triton.cdiv(constants["P"], height) * triton.cdiv(constants["Q"], width)
    turns = triton.cdiv(tiles * parts, PROGRAMS * device.processors)  # tiles of a program
    pixels = pixels_read(input, kernel, stride, padding, dilation, spatial)
    with torch.cuda.device_of(input):
        images, taps = pad(input, weight, padding, pixels, parts * lanes, depth // CHANNELS)
        stem_kernel[(triton.cdiv(tiles, max(1, turns)), parts)](
            images,
            taps,
            *call.epilogue(),
            tiles,
            float(negative_slope),
            **constants,
            TH=height,
            TW=width,
            BN=lanes,
            BK=depth,
            STAGES=3 if kernel[0] * depth <= AHEAD else 1,
            POOL=inside,
            num_warps=WARPS.get(device.target, 8),
        )
    return max_pool(output, pool // inside)


def tile_of(spatial: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the tile of which the fewest cover an image; of several the first."""
    return min(TILES, key=lambda tile: prod(map(triton.cdiv, spatial, tile)))


def pixels_read(
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    spatial: Sequence[int],
) -> int:
    """Pixels of all images with their padding, and past them what the last tile reads."""
    images = input.shape[0]
    rows, columns = (size + 2 * border for size, border in zip(input.shape[2:], padding, strict=True))
    last: list[int] = [triton.cdiv(size, tile) * tile - 1 for size, tile in zip(spatial, tile_of(spatial), strict=True)]
    row = (images - 1) * rows + last[0] * stride[0] + (kernel[0] - 1) * dilation[0]
    return max(images * rows * columns, row * columns + last[1] * stride[1] + kernel[1])
