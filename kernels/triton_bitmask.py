# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The bitmask kernel: four rows of blocks share each activation tile; a bit a row says whose product to form.

    y[m, o] = activation(sum over stored blocks of x[pixel(m) + offset] * w[o] + bias[o] + residual[m, o])

Where `triton_gather` multiplies the zeros of a union, this kernel branches around them: nothing is padded, at
the price of branches and narrower products. A candidate for wide layers with several taps. One step is one
column of blocks at one tap, BK = the block's width; blocks of 32 or 64 a side that cut the weight evenly.

    x         [N, H, W, C]       channels last
    entries   [steps + 1]        int32: channel | r << 24 | s << 27
    pointers  [unions + 1]       int32: first step of each union of four rows
    weights   [tiles, BO, BK]    dtype of x; the stored blocks, tap by tap, in the order of their visits
    outputs   [unions, 4*BO]     int32: output channel of each lane, O or more where there is none
    blocks    [steps + 1]        int32: first tile of the step << 4 | bit g set where row g has a block

A product under a branch is pipelined only where the loop itself asks for stages. With FIRST, row 0's product is under
none: on sm_90, ptxas 12.8 (Triton 3.6 and 3.7) makes an address of the activations for the first product alone, and
takes it for the others as well (`triton_addresses`). A row without a block adds zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fxdbsr.kernels.triton_call import Call
from fxdbsr.kernels.triton_configs import Tile
from fxdbsr.kernels.triton_device import device_of
from fxdbsr.kernels.triton_epilogue import finish_lanes
from fxdbsr.kernels.triton_pixels import decode, pixel_offsets, place, tap_inside


@triton.jit
def load_block(weight_ptrs, tile, taken, n, BN: tl.constexpr, BK: tl.constexpr):
    """The weights of one tile, or zeros that cost no traffic where the row has no block."""
    return tl.load(weight_ptrs + tile.to(tl.int64) * (BN * BK), mask=n[:, None] < taken * BN, other=0.0)


@triton.jit
def bitmask_kernel(
    x_ptr,
    entries_ptr,
    pointers_ptr,
    weights_ptr,
    outputs_ptr,
    blocks_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    pixels,
    unions,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    CACHE: tl.constexpr,
    STAGES: tl.constexpr,
    FIRST: tl.constexpr,
):
    """BM pixels by one union of four rows of BN outputs.

    FIRST: form row 0's product in every step, so that its addresses are made in every step.
    """
    union, pixel_tile = place(pixels, unions, BM, GROUP)
    m = pixel_tile * BM + tl.arange(0, BM)
    base, bits = pixel_offsets(m, pixels, H, W, C, P, Q, R, S, SH, SW, PH, PW, DH, DW, 1)
    first = tl.load(pointers_ptr + union)
    last = tl.load(pointers_ptr + union + 1)
    k = tl.arange(0, BK)
    n = tl.arange(0, BN)
    pixel_ptrs = x_ptr + (base[:, None] + k[None, :])
    weight_ptrs = weights_ptr + (n[:, None] * BK + k[None, :])
    acc0 = tl.full((BM, BN), 0.0, tl.float32)
    acc1 = tl.full((BM, BN), 0.0, tl.float32)
    acc2 = tl.full((BM, BN), 0.0, tl.float32)
    acc3 = tl.full((BM, BN), 0.0, tl.float32)
    entry = tl.load(entries_ptr + first)
    block = tl.load(blocks_ptr + first)
    for step in tl.range(first, last, num_stages=STAGES):
        channel, r, s = decode(entry)
        x_ptrs = pixel_ptrs + tl.multiple_of(channel + (r * (DH * W) + s * DW) * C, 16)
        if PH > 0 or PW > 0:
            x = tl.load(x_ptrs, mask=tap_inside(bits, r, s, R, S)[:, None], other=0.0, cache_modifier=CACHE)
        else:
            x = tl.load(x_ptrs, cache_modifier=CACHE)
        taken0 = block & 1
        taken1 = (block >> 1) & 1
        taken2 = (block >> 2) & 1
        taken3 = (block >> 3) & 1
        tile = block >> 4
        w0 = load_block(weight_ptrs, tile, taken0, n, BN, BK)
        w1 = load_block(weight_ptrs, tile + taken0, taken1, n, BN, BK)
        w2 = load_block(weight_ptrs, tile + taken0 + taken1, taken2, n, BN, BK)
        w3 = load_block(weight_ptrs, tile + taken0 + taken1 + taken2, taken3, n, BN, BK)
        entry = tl.load(entries_ptr + step + 1)
        block = tl.load(blocks_ptr + step + 1)
        if FIRST or taken0 != 0:
            acc0 = tl.dot(x, tl.trans(w0), acc0, input_precision=PRECISION)
        if taken1 != 0:
            acc1 = tl.dot(x, tl.trans(w1), acc1, input_precision=PRECISION)
        if taken2 != 0:
            acc2 = tl.dot(x, tl.trans(w2), acc2, input_precision=PRECISION)
        if taken3 != 0:
            acc3 = tl.dot(x, tl.trans(w3), acc3, input_precision=PRECISION)
    lanes_ptr = outputs_ptr + union * (4 * BN)
    finish_lanes(
        acc0, m, pixels, lanes_ptr, bias_ptr, residual_ptr, y_ptr, slope,
        O, BN, 16, False, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, False,
    )  # fmt: skip
    finish_lanes(
        acc1, m, pixels, lanes_ptr + BN, bias_ptr, residual_ptr, y_ptr, slope,
        O, BN, 16, False, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, False,
    )  # fmt: skip
    finish_lanes(
        acc2, m, pixels, lanes_ptr + 2 * BN, bias_ptr, residual_ptr, y_ptr, slope,
        O, BN, 16, False, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, False,
    )  # fmt: skip
    finish_lanes(
        acc3, m, pixels, lanes_ptr + 3 * BN, bias_ptr, residual_ptr, y_ptr, slope,
        O, BN, 16, False, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, False,
    )  # fmt: skip


def constants(tile: Tile, precision: str, target: str) -> dict[str, Any]:
    """The kernel's constants that follow from the tile.

    Args:
        precision: one of `triton_configs.PRECISIONS`.
        target: as `triton_device.Device.target`.
    """
    return {
        "BM": tile.pixels,
        "BN": tile.outputs,
        "BK": tile.depth,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "CACHE": tile.cache,
        "STAGES": tile.stages,
        "FIRST": target == "cuda:90",
    }


def launch(call: Call, tables: Sequence[Tensor], precision: str, tile: Tile) -> None:
    """Fill `call.output`; `precision` is one of `triton_configs.PRECISIONS`."""
    entries, pointers, weights, outputs, blocks = tables
    unions = outputs.shape[0]
    bitmask_kernel[(unions * triton.cdiv(call.pixels, tile.pixels),)](
        call.input,
        entries,
        pointers,
        weights,
        outputs,
        blocks,
        *call.epilogue(),
        call.pixels,
        unions,
        float(call.negative_slope),
        **call.constants(),
        **constants(tile, precision, device_of(call.input.device).target),
        GROUP=call.tiles_at_once(tile.pixels),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
