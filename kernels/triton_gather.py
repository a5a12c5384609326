# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The gather kernel: block-sparse conv as an implicit matrix product over the stored blocks.

    y[m, o] = activation(sum_k x[pixel(m) + offset(k)] * w[o, k] + bias[o] + residual[m, o])

One program computes BM output pixels times BN lanes of one union: rows of blocks that share an activation tile.
It walks the union's steps of BK products each; a step is BK/EW entries, each EW neighbouring input channels at
one tap. `triton_pack.pack` makes entries, pointers, weights and outputs:

    x         [N, H, W, C]           channels last
    entries   [steps + 1, BK/EW]     int32: channel | r << 24 | s << 27; r = s = 7: padding, reads as zero
    pointers  [unions + 1]           int32: first step of each union
    weights   [steps, LANES, BK]     dtype of x; zero where a row of the union has no block; or, for 3xTF32,
                                     [steps, 2, LANES, BK]: rounded to tf32, and what is left; for ieee products lanes
                                     are neighbours in memory, in all others products of a step
    outputs   [unions, LANES]        int32: output channel of each lane, O or more where there is none
    y         [pixels, O]            pixels = N*P*Q; or float32 `[SPLITS, pixels, O]` of partial sums; or, where a max
                                     pool follows, `[pixels / POOL**2, O]`

What the compiler needs, each checked on compiled code by tests/test_triton_offline.py: the entry of the next
step is carried in a register (a look-up in the same step costs pipeline buffers, two steps ahead loses the
pipeline); hints on addresses stand on the result of an operation; from 64 lanes on, the weights are the first
operand of the product, so that one instruction covers more of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fxdbsr.kernels.triton_call import Call
from fxdbsr.kernels.triton_configs import Tile
from fxdbsr.kernels.triton_device import device_of, overlaps
from fxdbsr.kernels.triton_epilogue import finish_lanes, reduce
from fxdbsr.kernels.triton_pixels import decode, pixel_offsets, place, pool_last, tap_inside
from fxdbsr.kernels.triton_product import multiply, split_tf32


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
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    LANES: tl.constexpr,
    EW: tl.constexpr,
    RUN: tl.constexpr,
    FULL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT_TF32: tl.constexpr,
    ONCE: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    LANES_LAST: tl.constexpr,
    OVERLAP: tl.constexpr,
    SPLITS: tl.constexpr,
    POOL: tl.constexpr,
    CACHE: tl.constexpr,
    COPY: tl.constexpr,
):
    """BM pixels by BN lanes of one union.

    COPY: neighbouring channels that one copy of activations may take. ONCE: compute an operand anew rather than
    use it in two products, for which Triton 3.8 would write it to shared memory. OVERLAP: the program may start before
    the kernel that runs ahead of it has ended, whose output it waits for, and lets the next one start in its turn.
    """
    part, tile = place(pixels, unions * (LANES // BN), BM, GROUP)
    union = part // (LANES // BN)
    lane = part % (LANES // BN) * BN
    m = tile * BM + tl.arange(0, BM)
    base, bits = pixel_offsets(m, pixels, H, W, C, P, Q, R, S, SH, SW, PH, PW, DH, DW, POOL)
    first = tl.load(pointers_ptr + union)
    last = tl.load(pointers_ptr + union + 1)
    if SPLITS > 1:
        share = (last - first + SPLITS - 1) // SPLITS
        first = tl.minimum(first + tl.program_id(1) * share, last)
        last = tl.minimum(first + share, last)
        y_ptr += tl.program_id(1).to(tl.int64) * pixels * O
    k = tl.arange(0, BK)
    n = lane + tl.arange(0, BN)
    pixel_ptrs = x_ptr + base[:, None]
    STEP: tl.constexpr = LANES * BK * (2 if SPLIT_TF32 else 1)
    weights_ptr += first.to(tl.int64) * STEP
    weight_ptrs = weights_ptr + (k[:, None] * LANES + n[None, :] if LANES_LAST else n[:, None] * BK + k[None, :])
    entry_ptrs = entries_ptr + first * (BK // EW) + k // EW
    acc = tl.full((BN, BM) if WEIGHTS_FIRST else (BM, BN), 0.0, tl.float32)
    entry = tl.load(entry_ptrs)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    for _ in range(first, last):
        channel, r, s = decode(entry)
        offset = channel + k % EW
        if R * S > 1:
            offset += (r * (DH * W) + s * DW) * C
        offset = tl.max_contiguous(tl.multiple_of(offset, COPY), COPY)
        if PH > 0 or PW > 0:
            mask = tl.max_constancy(tap_inside(bits[:, None], r[None, :], s[None, :], R, S), [1, COPY])
        else:
            mask = tl.max_constancy(s != 7, COPY)[None, :]
        x = tl.load(pixel_ptrs + offset[None, :], mask=mask, other=0.0, cache_modifier=CACHE)
        w = tl.load(weight_ptrs)
        if SPLIT_TF32:
            w_low = tl.load(weight_ptrs + LANES * BK)
        weight_ptrs += STEP
        entry_ptrs += BK // EW
        entry = tl.load(entry_ptrs)
        if SPLIT_TF32:
            x_high, x_low = split_tf32(x)
            partial = tl.full((BN, BM) if WEIGHTS_FIRST else (BM, BN), 0.0, tl.float32)
            partial = multiply(x_low, w, partial, WEIGHTS_FIRST, False, PRECISION)
            partial = multiply(x_high, w_low, partial, WEIGHTS_FIRST, False, PRECISION)
            acc += multiply(x - x_low if ONCE else x_high, w, partial, WEIGHTS_FIRST, False, PRECISION)
        else:
            acc = multiply(x, w, acc, WEIGHTS_FIRST, LANES_LAST, PRECISION)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    if POOL > 1:
        acc = pool_last(acc if WEIGHTS_FIRST else tl.trans(acc), BN, BM, POOL)
        m = tile * (BM // (POOL * POOL)) + tl.arange(0, BM // (POOL * POOL))
        pixels = pixels // (POOL * POOL)
    if WEIGHTS_FIRST or POOL > 1:
        acc = tl.trans(acc)
    finish_lanes(
        acc, m, pixels, outputs_ptr + union * LANES + lane, bias_ptr, residual_ptr, y_ptr, slope,
        O, BN, RUN, FULL, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, SPLITS > 1,
    )  # fmt: skip


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
        run: RUN, lanes in a row that are neighbouring outputs.
        precision: one of `triton_configs.PRECISIONS`.
    """
    entries, pointers, weights, outputs = tables
    unions, lanes = outputs.shape
    splits = 1 if partial is None else partial.shape[0]
    bias, residual, output = call.epilogue()
    device = call.input.device  # interpreted on the CPU
    overlap = device.type != "cpu" and overlaps(device_of(device).target)
    gather_kernel[(unions * (lanes // tile.outputs) * triton.cdiv(call.pixels, tile.pixels), splits)](
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
        **tile.constants(lanes, entry_width, precision, call.input.element_size()),
        GROUP=call.tiles_at_once(tile.pixels),
        RUN=min(run, tile.outputs),
        FULL=outputs.numel() == output.shape[1],
        SPLITS=splits,
        POOL=call.pool,
        LANES_LAST=weights.stride(-1) != 1,
        OVERLAP=overlap,
        **({"launch_pdl": True} if overlap else {}),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if partial is not None:
        reduce(call, partial)
