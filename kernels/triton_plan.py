"""Which tile a conv runs with: plain functions of shapes that need neither a GPU nor Triton.

At conversion `triton_pack` writes the kernel's form into the shapes of the tables. At every call `choose_tile`
picks the rest from these shapes and the number of output pixels, so that nothing is read back from the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, gcd, inf, prod

import torch
from torch import Tensor

from fxdbsr.kernels.triton_configs import PRECISIONS, Tile, default_tiles, tiles
from fxdbsr.kernels.triton_measured import Load, clocks, cost_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNELS = ("gather", "bitmask")
MOST_SPLITS = 8


def precision_of(dtype: torch.dtype) -> str:
    """How products of `dtype` are formed: "16", "tf32" or "ieee"; "3xtf32" has to be asked for.

    float32 follows cuDNN's switch for convs, as `torch.nn.Conv2d` does: tf32 where
    `torch.backends.cudnn.conv.fp32_precision` (or, formerly, `torch.backends.cudnn.allow_tf32`) allows it.
    """
    if dtype != torch.float32:
        return "16"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Choice:
    """What was decided at conversion, as far as the shapes of the other tables do not say it.

    It travels with the tables as the shape of an empty tensor, which every tracer and every graph takes.

    Args:
        kernel: one of `KERNELS`.
        precision: one of `PRECISIONS`.
        tile: index into `triton_configs.tiles` that was measured as the fastest, None for the planner's.
        splits: splits of the reduction that go with `tile`.
        pixels: output pixels for which both were measured; other sizes take the planner's.
    """

    kernel: str
    precision: str
    tile: int | None = None
    splits: int = 1
    pixels: int = 0

    def as_table(self, device: torch.device) -> Tensor:
        """int32 tensor without elements whose shape says it all."""
        tile = 0 if self.tile is None else self.tile + 1
        shape = (0, KERNELS.index(self.kernel), PRECISIONS.index(self.precision), tile, self.splits, self.pixels)
        return torch.empty(shape, dtype=torch.int32, device=device)

    @classmethod
    def of(cls, shape: Sequence[int]) -> Choice:
        """The choice of which `shape` is the table's."""
        _, kernel, precision, tile, splits, pixels = shape
        return cls(KERNELS[kernel], PRECISIONS[precision], tile - 1 if tile else None, splits, pixels)


def power_of_two_divisor(n: int, most: int) -> int:
    """Largest power of two that divides `n` and is at most `most`.

    >>> power_of_two_divisor(24, 32), power_of_two_divisor(7, 32)
    (8, 1)
    """
    return min(n & -n, most)


def lanes(outputs: int) -> int:
    """Width of the table that holds `outputs` output channels: a power of two of at least 16."""
    return max(16, 1 << (outputs - 1).bit_length())


def choose_depth(reduction: Sequence[int], itemsize: int, lanes: int, precision: str = "16") -> int:
    """BK: products a step, given those of each union; half the usual 128 bytes where that saves padding.

    Tables of 16 lanes keep the full depth: half of it would leave 8 bytes of weights for each thread to copy. 3xTF32
    keeps it as well: it has no tiles of half the depth.
    """
    full = 128 // itemsize
    if lanes < 32 or precision == "3xtf32":
        return full
    half = full // 2

    def padded(depth: int) -> int:
        return sum(ceil(n / depth) * depth for n in reduction)

    return half if 8 * padded(half) < 7 * padded(full) else full


@cache
def entry_width(in_channels: int, block_width: int, groups: int, depth: int) -> int:
    """EW: input channels of one entry, the largest power of two that cuts every block evenly."""
    return power_of_two_divisor(gcd(in_channels // groups, block_width), min(32, depth))


def choose_tile(
    pixels: int,
    unions: int,
    steps: int,
    lanes: int,
    depth: int,
    taps: int,
    precision: str,
    processors: int,
    target: str,
) -> tuple[Tile, int]:
    """The tile and the number of splits of the reduction for a call.

    The cheapest of those that were measured on such a device; where none was, the tile of most pixels that still
    gives every processor a program. Where it leaves half of the processors idle, the reduction is split, into no
    less than 8 steps each: fewer would not pay for the second kernel.

    Args:
        pixels: output pixels, N*P*Q.
        unions: unions of rows of blocks.
        steps: steps over all unions.
        lanes: lanes of a union.
        depth: products of a step, BK.
        taps: R*S; more than one reads neighbouring pixels again, which is worth keeping in L1.
        precision: one of `PRECISIONS`.
        processors: streaming multiprocessors of the device.
        target: "cuda:<capability>" or "hip:<architecture>".

    >>> choose_tile(32 * 56 * 56, 1, 4, 128, 64, 1, "16", 132, "cuda:90")[0].pixels
    128
    """

    def programs(tile: Tile) -> int:
        return unions * (lanes // tile.outputs) * ceil(pixels / tile.pixels)

    def cost(tile: Tile) -> float:
        found = cost_of(tile, precision, target)
        if found is None:
            return inf
        length = steps / max(unions, 1)
        return clocks(found, tile, precision, Load(programs(tile), programs(tile) * length, length), processors)

    listed = tiles(target, precision, lanes, depth, taps)
    tile = min(listed, key=cost)
    if cost(tile) == inf:
        candidates = default_tiles(target, precision, lanes, depth, taps)
        tile = next((tile for tile in candidates if programs(tile) >= processors), candidates[-1])
    splits = 1
    while splits < MOST_SPLITS and 2 * programs(tile) * splits <= processors and steps >= 16 * splits * unions:
        splits *= 2
    return tile, splits


def tile_of(
    choice: Choice,
    pixels: int,
    unions: int,
    steps: int,
    lanes: int,
    depth: int,
    taps: int,
    processors: int,
    target: str,
) -> tuple[Tile, int]:
    """The measured tile and splits where the call has the size that was measured, else the planner's.

    Tables that were made on another GPU, and pickled, may name a tile that this one does not have.
    """
    if choice.tile is not None and choice.pixels == pixels:
        listed = tiles(target, choice.precision, lanes, depth, taps)
        if choice.tile < len(listed):
            return listed[choice.tile], choice.splits
    return choose_tile(pixels, unions, steps, lanes, depth, taps, choice.precision, processors, target)


def packed_weights(values_shape: Sequence[int], tables_shapes: Sequence[Sequence[int]]) -> int:
    """Weights multiplied for each output pixel: all lanes and all products of all steps, padding included.

    A product in 3xTF32 counts once, though it takes three on the matrix unit.

    Raises:
        ValueError: not the shapes of the Triton engine's tables.
    """
    if len(tables_shapes) not in (5, 6):
        raise ValueError(f"tables_shapes: expected 5 or 6 shapes, got {len(tables_shapes)}")
    weights = tables_shapes[3]
    return prod(weights) // (2 if len(weights) == 4 else 1)  # 3xTF32 stores each weight as two
