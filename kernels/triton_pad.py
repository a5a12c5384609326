# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Images of few channels copied to where a conv reads them fast: four channels a pixel, and the padding around them.

    y[n, h, w, c] = x[n, c, h - top, w - left], and 0 where there is no such pixel or channel

A pixel of 16-bit numbers then takes 8 bytes at a multiple of 8, and no tap lies outside of the image. The weights are
copied in the same launch: to this kernel they are images of R by S pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 4
BLOCK = 512  # pixels of a program


@triton.jit
def copy(
    block,
    x_ptr,
    y_ptr,
    images,
    pixels,
    of_image,
    of_channel,
    of_row,
    of_column,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of `y [images, ROWS, COLUMNS, 4]`, which is zero from there to its end, `pixels`; x has any strides."""
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, 4)[None, :]
    image = pixel // (ROWS * COLUMNS)
    h = pixel // COLUMNS % ROWS - TOP
    w = pixel % COLUMNS - LEFT
    inside = (image < images) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    offset = image.to(tl.int64) * of_image + h.to(tl.int64) * of_row + w.to(tl.int64) * of_column
    mask = inside[:, None] & (c < C)
    x = tl.load(x_ptr + offset[:, None] + c.to(tl.int64) * of_channel, mask=mask, other=0.0)
    tl.store(y_ptr + (pixel * 4)[:, None] + c, x, mask=(pixel < pixels)[:, None])


@triton.jit
def pad_kernel(
    x_ptr,
    weight_ptr,
    image_ptr,
    taps_ptr,
    images,
    pixels,
    x_image,
    x_channel,
    x_row,
    x_column,
    outputs,
    taps,
    weight_image,
    weight_channel,
    weight_row,
    weight_column,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The images and, in the last programs, the weights, whose rows become WIDTH taps."""
    block = tl.program_id(0)
    blocks = (pixels + BLOCK - 1) // BLOCK
    if block < blocks:
        strides = (x_image, x_channel, x_row, x_column)
        copy(block, x_ptr, image_ptr, images, pixels, *strides, C, H, W, PH, PW, H + 2 * PH, W + 2 * PW, BLOCK)
    else:
        strides = (weight_image, weight_channel, weight_row, weight_column)
        copy(block - blocks, weight_ptr, taps_ptr, outputs, taps, *strides, C, R, S, 0, 0, R, WIDTH, BLOCK)


def pad(
    input: Tensor, weight: Tensor, padding: Sequence[int], pixels: int, outputs: int, width: int
) -> tuple[Tensor, Tensor]:
    """The images, as `pixels` of 4 channels, and the weights, `[outputs, R, width, 4]`; zero past what there is."""
    channels, *kernel = weight.shape[1:]
    image = torch.empty(pixels * CHANNELS, dtype=input.dtype, device=input.device)
    taps = torch.empty((outputs, kernel[0], width, CHANNELS), dtype=input.dtype, device=input.device)
    places = taps.numel() // CHANNELS
    pad_kernel[(triton.cdiv(pixels, BLOCK) + triton.cdiv(places, BLOCK),)](
        input,
        weight,
        image,
        taps,
        len(input),
        pixels,
        *input.stride(),
        len(weight),
        places,
        *weight.stride(),
        C=channels,
        H=input.shape[2],
        W=input.shape[3],
        R=kernel[0],
        S=kernel[1],
        PH=padding[0],
        PW=padding[1],
        WIDTH=width,
        BLOCK=BLOCK,
    )
    return image, taps
