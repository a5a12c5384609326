"""The tiles that are shipped: for sm_90 the fastest of those measured on an H100, else from compiled code and a model.

tests/test_triton_offline.py compiles every tile of every target and holds it to what it is meant to be: no
spills, matrix instructions, wide copies. What fails there does not stand here. Where a table depends on the
version of Triton, the version was compiled with and read; needs neither a GPU nor Triton itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

PRECISIONS = ("16", "tf32", "ieee", "3xtf32")


@dataclass(frozen=True)
class Tile:
    """One compiled form of a kernel.

    Args:
        pixels: output pixels of a tile, BM.
        outputs: output channels of a tile, BN; of the bitmask kernel those of one row.
        depth: products along the reduction in a step, BK.
        warps: warps of a program.
        stages: buffers of the software pipeline.
        weights_first: the weights are the first operand of the matrix product.
        cache: cache modifier of the activation loads.
        copy: bytes that one asynchronous copy of activations may take, 16 or 8.
    """

    pixels: int
    outputs: int
    depth: int
    warps: int
    stages: int
    weights_first: bool
    cache: str = ""
    copy: int = 16

    def shared_bytes(self, precision: str) -> int:
        """Bytes of shared memory in which its stages lie, operands of one number each."""
        return self.stages * (self.pixels + self.outputs) * self.depth * (2 if precision == "16" else 4)

    def constants(self, lanes: int, entry_width: int, precision: str, itemsize: int) -> dict[str, Any]:
        """The gather kernel's constants that follow from the tile and the tables."""
        return {
            "BM": self.pixels,
            "BN": self.outputs,
            "BK": self.depth,
            "LANES": lanes,
            "EW": entry_width,
            "PRECISION": "tf32" if "tf32" in precision else "ieee",
            "SPLIT_TF32": precision == "3xtf32",
            "ONCE": triton_version() == (3, 8),
            "WEIGHTS_FIRST": self.weights_first,
            "CACHE": self.cache,
            "COPY": min(entry_width, self.copy // itemsize),
        }


@cache
def triton_version() -> tuple[int, int]:
    """Major and minor version of the Triton that is installed; that of the newest tables where none is."""
    try:
        import triton
    except ImportError:
        return (3, 9)
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def family(target: str) -> str:
    """The table that serves "cuda:<capability>" or "hip:<architecture>": "cuda:90", "cuda:80" or "hip"."""
    if target.startswith("hip"):
        return "hip"
    return "cuda:90" if target == "cuda:90" else "cuda:80"


@cache
def tiles(target: str, precision: str, lanes: int, depth: int, taps: int) -> tuple[Tile, ...]:
    """Tiles of the gather kernel for tables of that many lanes and that depth, in the order of preference.

    Those that `default_tiles` leaves out are for `triton_tune`. With several taps the activations are asked to stay
    in L1, where they are read again; not on sm_90, where that was measured to be slower.
    """
    serves = family(target)
    if precision == "3xtf32":
        found = [] if serves == "hip" else _tensor_float(serves, lanes, depth)
    elif precision == "ieee":
        found = _vector(serves, lanes, depth, taps)
    else:
        found = _matrix(serves, precision, lanes, depth)
    if serves == "hip":
        return tuple(replace(tile, stages=2) for tile in found)
    if taps == 1 or serves == "cuda:90":  # where narrow copies through L1 cost more than they save
        return tuple(found)
    if triton_version() >= (3, 9):
        return tuple(replace(tile, cache=".ca") for tile in found)
    # before 3.9 a copy of 16 bytes goes past L1 whatever the modifier says, one of 8 bytes through it
    wide = [tile for tile in found if tile.pixels >= 128 and tile.outputs >= 64 and precision in ("16", "tf32")]
    return (*(replace(tile, cache=".ca", copy=8) for tile in wide), *found)


def default_tiles(target: str, precision: str, lanes: int, depth: int, taps: int) -> tuple[Tile, ...]:
    """Those of `tiles` among which the planner chooses by size alone: as wide as the first, of each size one.

    Most pixels first.
    """
    listed = tiles(target, precision, lanes, depth, taps)
    first: dict[int, Tile] = {}
    for tile in listed:
        if tile.outputs == listed[0].outputs:
            first.setdefault(tile.pixels, tile)
    return tuple(sorted(first.values(), key=lambda tile: -tile.pixels))


def _matrix(serves: str, precision: str, lanes: int, depth: int) -> list[Tile]:
    """16 bits and tf32 on matrix units."""
    if serves == "cuda:90" and lanes >= 32:
        return [Tile(pixels, lanes, depth, warps, stages, lanes >= 64) for pixels, warps, stages in HOPPER[lanes]]
    if lanes < 64:
        return [Tile(128, lanes, depth, 4, 4, False), Tile(128, lanes, depth, 4, 4, True)]
    return [Tile(128, lanes, depth, 4 if lanes == 64 else 8, 3, True), Tile(64, lanes, depth, 4, 4, True)]


# lanes to (pixels, warps, stages): few buffers where many programs hide each other's latency, more where few run
HOPPER = {
    32: ((128, 4, 2), (64, 4, 4)),
    64: ((128, 4, 2), (64, 4, 2), (64, 4, 4)),
    128: ((128, 8, 3), (64, 4, 3), (64, 4, 2)),
}


def _vector(serves: str, lanes: int, depth: int, taps: int) -> list[Tile]:
    """ieee float32 outside of the matrix unit."""
    if lanes < 64:
        wide = [Tile(128, lanes, depth, 4, 3, False)] * (lanes == 32)  # fewer loads for a product
        return [*wide, Tile(64, lanes, depth, 4, 3, False)]
    if depth < 32:  # wider or smaller tiles spill
        return [Tile(128, 64, depth, 8, 4, False)]
    return [Tile(64, 128, depth, 8, 3, False)] * (lanes == 128) + [Tile(64, 64, depth, 4, 3, False)]


def _tensor_float(serves: str, lanes: int, depth: int) -> list[Tile]:
    """3xTF32: by mma.sync, which takes fewer than 64 outputs as the first operand, both operands from registers.

    wgmma with an operand in registers comes last: wrong results were reported of it with ptxas 12, Triton 3.8
    stores the operand first, and at half the depth a barrier is missing.
    """
    if depth < 32:  # tiles of half the depth spill
        return []
    tall, low = (Tile(pixels, min(lanes, 32), depth, 4, 3, True) for pixels in (128, 64))
    found = [tall, low]
    if triton_version() == (3, 8):  # which computes an operand anew, and needs all registers for that
        found = [low]
    elif triton_version() >= (3, 9) and serves == "cuda:90":  # where the other one spills
        found = [tall if lanes >= 32 else low]
    if serves == "cuda:90" and lanes >= 64 and (3, 7) <= triton_version() != (3, 8):
        found += [Tile(128, 64, depth, 8, 3, False), Tile(64, 64, depth, 4, 3, False)]
    return found


# (precision, BO, BC) to the tile of the bitmask kernel, whose step is one block deep. NVIDIA only: it spills
# on gfx942. With ieee products the gather kernel pads nothing, so that there is nothing to gain.
BITMASK = {
    ("16", 32, 32): Tile(128, 32, 32, 4, 3, False),
    ("16", 32, 64): Tile(128, 32, 64, 8, 3, False),
    ("16", 64, 32): Tile(128, 64, 32, 8, 3, False),
    ("tf32", 32, 32): Tile(128, 32, 32, 8, 3, False),
}


def bitmask_tile(precision: str, block: tuple[int, int], taps: int) -> Tile:
    """The tile of the bitmask kernel for blocks of that size."""
    cached = taps > 1 and triton_version() >= (3, 9)
    return replace(BITMASK[precision, *block], cache=".ca" if cached else "")
