"""Compile the kernels for a GPU that is not there; Triton carries the compilers.

`shipped` lists every tile that the engine may choose on a target, with what its machine code must show.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fxdbsr.kernels import triton_bitmask, triton_gather
from fxdbsr.kernels.triton_configs import BITMASK, PRECISIONS, Tile, bitmask_tile, tiles
from fxdbsr.kernels.triton_device import overlaps
from fxdbsr.kernels.triton_machine_code import MATRIX, Facts, faults, read_amd, read_nvidia

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
GEOMETRIES = {
    "3x3": {"H": 14, "W": 14, "C": 256, "P": 14, "Q": 14, "O": 256, "R": 3, "S": 3, "PH": 1, "PW": 1},
    "1x1": {"H": 14, "W": 14, "C": 256, "P": 14, "Q": 14, "O": 1024, "R": 1, "S": 1, "PH": 0, "PW": 0},
    "7x7": {"H": 14, "W": 14, "C": 256, "P": 14, "Q": 14, "O": 256, "R": 7, "S": 7, "PH": 3, "PW": 3},
}
DTYPES = {"16": ("fp16", "bf16"), "tf32": ("fp32",), "ieee": ("fp32",), "3xtf32": ("fp32",)}
LANES = (16, 32, 64, 128)

SCALARS = {"pixels": "i32", "unions": "i32", "slope": "fp32"}
EPILOGUE = {"HAS_BIAS": True, "HAS_RESIDUAL": True, "ACTIVATION": "relu"}
UNIT = {"SH": 1, "SW": 1, "DH": 1, "DW": 1, "GROUP": 64}


@dataclass(frozen=True)
class Shipped:
    """A tile that the engine may choose.

    Args:
        kernel: "gather" or "bitmask".
        lanes: outputs of the tables that it serves.
        geometry: key of `GEOMETRIES` whose taps it is meant for.
    """

    target: str
    kernel: str
    precision: str
    lanes: int
    geometry: str
    tile: Tile

    def __str__(self) -> str:
        t = self.tile
        name = f"{self.target}-{self.kernel}-{self.precision}-{self.geometry}-{t.pixels}x{t.outputs}x{t.depth}"
        order = "-weights_first" if t.weights_first else ""
        return f"{name}-w{t.warps}-s{t.stages}{order}-copy{t.copy}-of{self.lanes}"

    def compile(self, dtype: str | None = None, **changes: Any) -> Facts:
        """Compile it; `changes` are other values for the kernel's constants."""
        dtype = dtype or DTYPES[self.precision][0]
        arguments = (self.tile, self.precision, dtype, self.geometry, self.target)
        if self.kernel == "bitmask":
            return compile_bitmask(*arguments, **changes)
        return compile_gather(*arguments, lanes=self.lanes, **changes)

    def faults(self, facts: Facts) -> list[str]:
        """What is wrong with it, in sentences."""
        synchronous = self.tile.weights_first and (self.precision == "3xtf32" or self.tile.outputs < 64)
        matrix = MATRIX[self.target][-1 if synchronous else 0]  # mma.sync, or the fastest
        cached = self.tile.cache == ".ca"
        look_ups = 2 if self.kernel == "bitmask" else 1
        return faults(facts, self.precision, self.tile.copy, cached, look_ups, matrix)


def shipped(target: str, geometries: tuple[str, ...] = ("3x3", "1x1")) -> Iterator[Shipped]:
    """Every tile of every kernel that may be chosen on `target`, once."""
    for geometry in geometries:
        taps = GEOMETRIES[geometry]["R"] * GEOMETRIES[geometry]["S"]
        for precision in PRECISIONS:
            full = 64 if precision == "16" else 32
            seen = set()
            for lanes in LANES:
                for tile in tiles(target, precision, lanes, full, taps):
                    if tile not in seen:  # a tile narrower than the table is compiled for the narrowest table
                        seen.add(tile)
                        yield Shipped(target, "gather", precision, lanes, geometry, tile)
        if target.startswith("cuda"):
            for precision, *block in BITMASK:
                tile = bitmask_tile(precision, (block[0], block[1]), taps)
                yield Shipped(target, "bitmask", precision, 4 * block[0], geometry, tile)


def half_depth(entry: Shipped) -> Shipped | None:
    """The tile for tables of half the depth, None where there is none."""
    depth = entry.tile.depth // 2
    taps = GEOMETRIES[entry.geometry]["R"] * GEOMETRIES[entry.geometry]["S"]
    tile = replace(entry.tile, depth=depth)
    return replace(entry, tile=tile) if tile in tiles(entry.target, entry.precision, entry.lanes, depth, taps) else None


def compile_gather(
    tile: Tile,
    precision: str,
    dtype: str,
    geometry: str,
    target: str,
    splits: int = 1,
    lanes: int = 0,
    **changes: Any,
) -> Facts:
    """`gather_kernel` compiled for `target`.

    Args:
        precision: one of `triton_configs.PRECISIONS`.
        dtype: Triton's name, "fp16", "bf16" or "fp32".
        geometry: key of `GEOMETRIES`.
        lanes: outputs of the tables; 0: those of the tile.
        changes: other values for the kernel's constants.
    """
    pointers = _pointers(dtype)
    if splits > 1:
        pointers["y_ptr"] = "*fp32"
    constants = {
        **GEOMETRIES[geometry],
        **UNIT,
        **EPILOGUE,
        **tile.constants(lanes or tile.outputs, min(32, tile.depth), precision, 2 if precision == "16" else 4),
        "RUN": min(16, tile.outputs),
        "FULL": True,
        "SPLITS": splits,
        "POOL": 1,
        "LANES_LAST": precision == "ieee",
        "OVERLAP": overlaps(target),
        **changes,
    }
    return compile_kernel(triton_gather.gather_kernel, pointers, SCALARS, constants, tile.warps, tile.stages, target)


def compile_bitmask(tile: Tile, precision: str, dtype: str, geometry: str, target: str, **changes: Any) -> Facts:
    """`bitmask_kernel` compiled for `target`; arguments as in `compile_gather`."""
    constants = {
        **GEOMETRIES[geometry],
        **UNIT,
        **EPILOGUE,
        **triton_bitmask.constants(tile, precision, target),
        **changes,
    }
    pointers = _pointers(dtype, "blocks")
    return compile_kernel(triton_bitmask.bitmask_kernel, pointers, SCALARS, constants, tile.warps, tile.stages, target)


def _pointers(dtype: str, *indices: str) -> dict[str, str]:
    floats = {f"{name}_ptr": f"*{dtype}" for name in ("x", "weights", "bias", "residual", "y")}
    return floats | {f"{name}_ptr": "*i32" for name in ("entries", "pointers", "outputs", *indices)}


def compile_kernel(
    kernel: Any,
    pointers: dict[str, str],
    scalars: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    stages: int,
    target: str,
) -> Facts:
    """`kernel` compiled, and read; `pointers` are taken to be multiples of 16 bytes."""
    names = kernel.arg_names
    types = {**pointers, **scalars, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    shared = compiled.metadata.shared
    if target.startswith("hip"):
        return read_amd(compiled.asm["amdgcn"], shared, target)
    return read_nvidia(compiled.asm["cubin"], shared, target)
