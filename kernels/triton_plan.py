"""Which tile a conv runs with, and what a step costs: plain functions that need neither a GPU nor Triton.

At conversion `triton_pack` weighs 1, 2 or 4 rows of blocks to a union by `step_clocks`; the choice is written
into the shapes of the tables. At every call `choose_tile` picks the rest from these shapes and the number of
output pixels, so that nothing is read back from the GPU. The start values come from compiled code and the
resource model below, not from measurements; `CONFIGS` lists every tile that can be chosen, and
tests/test_triton_offline.py compiles them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, prod

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PRECISIONS = ("16", "tf32", "ieee", "3xtf32")

# An NVIDIA H200 per SM and clock: FLOP (ieee: FMA units), bytes of shared memory, bytes from L2.
FLOP_PER_CLOCK = {"16": 4096, "tf32": 2048, "ieee": 256, "3xtf32": 2048 / 3}
SHARED_PER_CLOCK = 128
L2_PER_CLOCK = 30


@dataclass(frozen=True)
class Tile:
    """One compiled form of the gather kernel.

    Args:
        pixels: output pixels of a tile, BM.
        outputs: output channels of a tile, BN; padded to a power of two.
        depth: products along the reduction in a step, BK.
        warps: warps of a program.
        stages: buffers of the software pipeline.
        weights_first: the weights are the first operand of the matrix product.
        cache: cache modifier of the activation loads.
    """

    pixels: int
    outputs: int
    depth: int
    warps: int
    stages: int
    weights_first: bool
    cache: str = ""


def _configs() -> dict[tuple[str, int], tuple[Tile, ...]]:
    table: dict[tuple[str, int], tuple[Tile, ...]] = {}
    for precision, depth in (("16", 64), ("tf32", 32)):
        for outputs in (16, 32):
            table[precision, outputs] = (Tile(128, outputs, depth, 4, 4, False),)
        table[precision, 64] = (Tile(128, 64, depth, 4, 3, True), Tile(64, 64, depth, 4, 4, True))
        table[precision, 128] = (Tile(128, 128, depth, 8, 3, True), Tile(64, 128, depth, 4, 4, True))
    table["16", 128] = (Tile(256, 128, 64, 8, 3, True), *table["16", 128])
    for outputs, warps in ((16, 4), (32, 4), (64, 4), (128, 8)):
        table["ieee", outputs] = (Tile(64, outputs, 32, warps, 3, False),)
        table["3xtf32", outputs] = (Tile(64, outputs, 32, 4, 3, False),)
    return table


# (precision, outputs) to the tiles to choose from, most pixels first, at the full depth of 128 bytes a row.
CONFIGS = _configs()


# (precision, BO, BC) to the tile of the bitmask kernel, whose step is one block deep. NVIDIA only: it spills
# on gfx942. With ieee products the gather kernel pads nothing, so that there is nothing to gain.
BITMASK_CONFIGS = {
    ("16", 32, 32): Tile(128, 32, 32, 4, 3, False),
    ("16", 32, 64): Tile(128, 32, 64, 8, 3, False),
    ("16", 64, 32): Tile(128, 64, 32, 8, 3, False),
    ("tf32", 32, 32): Tile(128, 32, 32, 8, 3, False),
}


def precision_of(dtype: torch.dtype) -> str:
    """How products of `dtype` are formed: "16", "tf32" or "ieee"; "3xtf32" has to be asked for.

    float32 follows cuDNN's switch for convs, as `torch.nn.Conv2d` does: tf32 where
    `torch.backends.cudnn.conv.fp32_precision` (or, formerly, `torch.backends.cudnn.allow_tf32`) allows it.
    """
    if dtype != torch.float32:
        return "16"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


def power_of_two_divisor(n: int, most: int) -> int:
    """Largest power of two that divides `n` and is at most `most`.

    >>> power_of_two_divisor(24, 32), power_of_two_divisor(7, 32)
    (8, 1)
    """
    return min(n & -n, most)


def lanes(outputs: int) -> int:
    """Width of the tile that holds `outputs` output channels: a power of two of at least 16."""
    return max(16, 1 << (outputs - 1).bit_length())


def step_clocks(outputs: int, precision: str, taps: int = 1) -> float:
    """Clocks of one SM for a step 128 bytes deep, 128 pixels by `outputs` lanes; the slowest unit decides.

    Units: products; shared memory (operands written once, then read by the matrix unit); reads from L2. With
    more than one tap three quarters of the activations are taken to come from L1, which shares its port with
    shared memory.
    """
    depth, row = (64, 128) if precision == "16" else (32, 128)
    products = 2 * 128 * outputs * depth / FLOP_PER_CLOCK[precision]
    moved = 128 + outputs + (128 if taps > 1 else 0)
    if precision == "ieee" or outputs < 64:
        moved += 2 * (64 + outputs)
    else:
        moved += outputs // 64 * (64 + 128)
    fetched = 128 * (0.25 if taps > 1 else 1) + outputs
    return max(products, moved * row / SHARED_PER_CLOCK, fetched * row / L2_PER_CLOCK)


def choose_depth(reduction: Sequence[int], dtype: torch.dtype) -> int:
    """BK: products a step, given those of each union; half the usual 128 bytes where that saves padding."""
    full = 128 // dtype.itemsize
    half = full // 2

    def padded(depth: int) -> int:
        return sum(ceil(n / depth) * depth for n in reduction)

    return half if 8 * padded(half) < 7 * padded(full) else full


@cache
def choose_tile(
    pixels: int,
    unions: int,
    steps: int,
    outputs: int,
    depth: int,
    taps: int,
    precision: str,
    processors: int,
    vendor: str,
) -> tuple[Tile, int]:
    """The tile and the number of splits of the reduction for a call.

    The tile of most pixels that still gives every processor a program; two for tiles of 256 pixels, of which
    only one fits a processor at a time. Where even the smallest leaves half of the processors idle, the
    reduction is split, into no less than 8 steps each: fewer would not pay for the second kernel.

    Args:
        pixels: output pixels, N*P*Q.
        unions: unions of rows of blocks.
        steps: steps over all unions.
        outputs: lanes of a union, BN.
        depth: products of a step, BK.
        taps: R*S; more than one reads neighbouring pixels again, which is worth keeping in L1.
        precision: one of `PRECISIONS`.
        processors: streaming multiprocessors of the device.
        vendor: "cuda:<capability>" or "hip:<architecture>".

    >>> choose_tile(32 * 56 * 56, 4, 4 * 9, 64, 64, 1, "16", 132, "cuda:90")[0].pixels
    128
    """
    candidates = [adapt(tile, depth, taps, vendor) for tile in CONFIGS[precision, outputs]]
    tile = candidates[-1]
    for candidate in reversed(candidates):
        waves = 2 if candidate.pixels == 256 else 1
        if unions * ceil(pixels / candidate.pixels) >= waves * processors:
            tile = candidate
    programs = unions * ceil(pixels / tile.pixels)
    splits = 1
    while splits < 8 and 2 * programs * splits <= processors and steps >= 16 * splits * unions:
        splits *= 2
    return tile, splits


def adapt(tile: Tile, depth: int, taps: int, vendor: str) -> Tile:
    """`tile` at the depth of the tables, within the limits of the device."""
    if vendor < "cuda:90" or vendor.startswith("hip"):  # 256 pixels spill on sm_80, and overflow gfx942's memory
        tile = replace(tile, pixels=min(tile.pixels, 128))
    if vendor.startswith("hip"):
        return replace(tile, depth=depth, stages=2)
    return replace(tile, depth=depth, cache=".ca" if taps > 1 else "")


def packed_weights(values_shape: Sequence[int], tables_shapes: Sequence[Sequence[int]]) -> int:
    """Weights multiplied for each output pixel: all lanes and all products of all steps, padding included.

    A product in 3xTF32 counts once, though it takes three on the matrix unit.

    Raises:
        ValueError: not the shapes of the Triton engine's tables.
    """
    if len(tables_shapes) not in (4, 5):
        raise ValueError(f"tables_shapes: expected 4 or 5 shapes, got {len(tables_shapes)}")
    weights = tables_shapes[2]
    return prod(weights) // (2 if len(weights) == 4 else 1)  # 3xTF32 stores each weight as two
