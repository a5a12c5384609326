# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The gather kernel: block-sparse conv as an implicit matrix product over the stored blocks.

    y[m, o] = activation(sum_k x[pixel(m) + offset(k)] * w[o, k] + bias[o] + residual[m, o])

One program computes BM output pixels times one union (up to BN output channels: the rows of blocks that share
an activation tile). It walks the union's steps of BK products each; a step is BK/EW entries, each EW
neighbouring input channels at one tap. `triton_pack.pack` makes entries, pointers, weights and outputs:

    x         [N, H, W, C]         channels last
    entries   [steps + 1, BK/EW]   int32: channel | r << 24 | s << 27; r = s = 7: padding, reads as zero
    pointers  [unions + 1]         int32: first step of each union
    weights   [steps, BN, BK]      dtype of x; zero where a row of the union has no block; or, for 3xTF32,
                                   [steps, 2, BN, BK]: rounded to tf32, and what is left
    outputs   [unions, BN]         int32: output channel of each lane, O or more where there is none
    y         [pixels, O]          pixels = N*P*Q; or float32 `[SPLITS, pixels, O]` of partial sums

What the compiler needs, each checked on compiled code by tests/test_triton_offline.py: the entry of the next
step is carried in a register (a look-up in the same step costs pipeline buffers, two steps ahead loses the
pipeline); hints on addresses stand on the result of an operation; from 64 outputs on, the weights are the
first operand of the product, so that one instruction covers more of them.

3xTF32 forms high*high + high*low + low*high of operands split into two tf32 numbers each, which keeps about
22 bits of the 24 of float32; where float32 would give an infinity it gives NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fxdbsr.kernels.triton_call import Call
from fxdbsr.kernels.triton_epilogue import finish, reduce
from fxdbsr.kernels.triton_plan import Tile


@triton.jit
def pixel_offsets(
    m,
    pixels,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
):
    """Element offset of tap (0, 0) of output pixel `m`, and bits that tell which taps lie inside the image.

    Bit r*S + s for kernels of up to 31 taps; for larger ones bit r for rows and bit 8 + s for columns.
    """
    m = tl.minimum(m, pixels - 1)  # past the end: read the last pixel again, store nothing
    image = m // (P * Q)
    p = m // Q - image * P
    q = m - (m // Q) * Q
    h = p * SH - PH
    w = q * SW - PW
    base = ((image * H + h) * W + w) * C
    bits = m * 0
    if PH > 0 or PW > 0:
        if R * S <= 31:
            for r in tl.static_range(R):
                for s in tl.static_range(S):
                    row = (h + r * DH >= 0) & (h + r * DH < H)
                    inside = row & (w + s * DW >= 0) & (w + s * DW < W)
                    bits = bits | (inside.to(tl.int32) << (r * S + s))
        else:
            for r in tl.static_range(R):
                bits = bits | (((h + r * DH >= 0) & (h + r * DH < H)).to(tl.int32) << r)
            for s in tl.static_range(S):
                bits = bits | (((w + s * DW >= 0) & (w + s * DW < W)).to(tl.int32) << (8 + s))
    return base, bits


@triton.jit
def split_tf32(x):
    """`x` rounded to the 10 bits of tf32, and what is left."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -8192
    high = bits.to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def gather_kernel(
    x_ptr,
    entries_ptr,
    pointers_ptr,
    weights_ptr,
    outputs_ptr,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EW: tl.constexpr,
    RUN: tl.constexpr,
    FULL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    SPLITS: tl.constexpr,
    CACHE: tl.constexpr,
):
    """BM pixels by one union. RUN lanes in a row are neighbouring outputs; FULL: every lane is an output."""
    union = tl.program_id(0) % unions
    m = (tl.program_id(0) // unions) * BM + tl.arange(0, BM)
    base, bits = pixel_offsets(m, pixels, H, W, C, P, Q, R, S, SH, SW, PH, PW, DH, DW)
    first = tl.load(pointers_ptr + union)
    last = tl.load(pointers_ptr + union + 1)
    if SPLITS > 1:
        share = (last - first + SPLITS - 1) // SPLITS
        first = tl.minimum(first + tl.program_id(1) * share, last)
        last = tl.minimum(first + share, last)
    k = tl.arange(0, BK)
    n = tl.arange(0, BN)
    pixel_ptrs = x_ptr + base[:, None]
    STEP: tl.constexpr = BN * BK * (2 if PRECISION == "3xtf32" else 1)
    weight_ptrs = weights_ptr + first.to(tl.int64) * STEP + (n[:, None] * BK + k[None, :])
    entry_ptrs = entries_ptr + first * (BK // EW) + k // EW
    acc = tl.full((BN, BM) if WEIGHTS_FIRST else (BM, BN), 0.0, tl.float32)
    entry = tl.load(entry_ptrs)
    for _ in range(first, last):
        channel = entry & 0xFFFFFF
        r = (entry >> 24) & 7
        s = entry >> 27
        offset = channel + k % EW
        if R * S > 1:
            offset += (r * (DH * W) + s * DW) * C
        offset = tl.max_contiguous(tl.multiple_of(offset, EW), EW)
        if PH > 0 or PW > 0:
            if R * S <= 31:
                inside = (bits[:, None] >> tl.minimum(r * S + s, 31)[None, :]) & 1
            else:
                inside = (bits[:, None] >> r[None, :]) & (bits[:, None] >> (8 + s)[None, :]) & 1
            mask = tl.max_constancy(inside != 0, [1, EW])
        else:
            mask = tl.max_constancy(s != 7, EW)[None, :]
        x = tl.load(pixel_ptrs + offset[None, :], mask=mask, other=0.0, cache_modifier=CACHE)
        w = tl.load(weight_ptrs)
        if PRECISION == "3xtf32":
            w_low = tl.load(weight_ptrs + BN * BK)
        weight_ptrs += STEP
        entry_ptrs += BK // EW
        entry = tl.load(entry_ptrs)
        if PRECISION == "3xtf32":
            x_high, x_low = split_tf32(x)
            acc = tl.dot(x_low, tl.trans(w), acc, input_precision="tf32")
            acc = tl.dot(x_high, tl.trans(w_low), acc, input_precision="tf32")
            acc = tl.dot(x_high, tl.trans(w), acc, input_precision="tf32")
        elif WEIGHTS_FIRST:
            acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    if WEIGHTS_FIRST:
        acc = tl.trans(acc)
    o = tl.load(outputs_ptr + union * BN + n)
    o = tl.max_contiguous(tl.multiple_of(o, RUN), RUN)
    index = m[:, None] * O + o[None, :]
    live = (m < pixels)[:, None]
    if not FULL:
        live = live & tl.max_constancy(o < O, RUN)[None, :]
    if SPLITS > 1:
        tl.store(y_ptr + tl.program_id(1).to(tl.int64) * pixels * O + index, acc, mask=live)
    else:
        if HAS_BIAS:
            bias = tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
        else:
            bias = tl.full((1, BN), 0.0, tl.float32)
        finish(acc, index, live, bias, residual_ptr, y_ptr, slope, HAS_RESIDUAL, ACTIVATION)


def launch(
    call: Call,
    tables: Sequence[Tensor],
    partial: Tensor | None,
    entry_width: int,
    run: int,
    precision: str,
    tile: Tile,
) -> None:
    """Fill `call.output`.

    Args:
        partial: None, or float32 `[splits, output.numel()]` to split the reduction over.
        entry_width: EW, input channels of an entry.
        run: RUN, lanes that always hold neighbouring outputs.
        precision: `input_precision` of the matrix product, or "3xtf32".
    """
    entries, pointers, weights, outputs = tables
    unions = outputs.shape[0]
    splits = 1 if partial is None else partial.shape[0]
    bias, residual, output = call.epilogue()
    gather_kernel[(unions * triton.cdiv(call.pixels, tile.pixels), splits)](
        call.input,
        entries,
        pointers,
        weights,
        outputs,
        bias,
        residual,
        output if partial is None else partial,
        call.pixels,
        unions,
        float(call.negative_slope),
        **call.constants(),
        BM=tile.pixels,
        BN=tile.outputs,
        BK=tile.depth,
        EW=entry_width,
        RUN=run,
        FULL=outputs.numel() == output.shape[1],
        PRECISION=precision,
        WEIGHTS_FIRST=tile.weights_first,
        SPLITS=splits,
        CACHE=tile.cache,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if partial is not None:
        reduce(call, partial)
