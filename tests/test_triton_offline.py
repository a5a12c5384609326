"""The shipped tiles, compiled for GPUs that are not there: no spills, matrix instructions, wide copies.

The last tests compile kernels that are known to be bad and ask that each fault be found.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton import language as tl  # noqa: E402

from fxdbsr.kernels import triton_epilogue, triton_offline  # noqa: E402
from fxdbsr.kernels.triton_offline import (  # noqa: E402
    SHARED_LIMIT,
    TARGETS,
    Facts,
    compile_bitmask,
    compile_gather,
    compile_kernel,
    faults,
)
from fxdbsr.kernels.triton_plan import BITMASK_CONFIGS, CONFIGS, Tile, adapt  # noqa: E402

TAPS = {"3x3": 9, "1x1": 1, "7x7": 49}
SHIPPED = [
    (target, precision, tile)
    for target in TARGETS
    for (precision, _), tiles in CONFIGS.items()
    if precision != "3xtf32" or target.startswith("cuda")
    for tile in {adapt(tile, tile.depth, TAPS["3x3"], target): None for tile in tiles}
]
DTYPE = {"16": "fp16", "tf32": "fp32", "ieee": "fp32", "3xtf32": "fp32"}


@pytest.fixture(scope="module", autouse=True)
def compiled_anew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Triton's cache on disk would hide a compiler that changed."""
    gc.collect()
    gc.disable()  # CPython 3.11: finalizers that run while two threads parse make ast.parse raise SystemError
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.mktemp("triton")))
        yield
    gc.enable()


@pytest.fixture(scope="module")
def facts(compiled_anew: None) -> Iterator[dict[tuple[Any, ...], Future[Facts]]]:
    """All shipped tiles, compiled side by side: the disassembler takes half of the time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {}
        for key in SHIPPED:
            target, precision, tile = key
            futures["gather", *key] = pool.submit(shipped, tile, precision, "3x3", target)
        for key in BITMASK:
            target, precision, tile = key
            futures["bitmask", *key] = pool.submit(compile_bitmask, tile, precision, DTYPE[precision], "3x3", target)
        yield futures
        pool.shutdown(cancel_futures=True)


def shipped(
    tile: Tile,
    precision: str,
    geometry: str,
    target: str,
    dtype: str | None = None,
    splits: int = 1,
    **changes: Any,
) -> Facts:
    tile = adapt(tile, tile.depth, TAPS[geometry], target)
    return compile_gather(tile, precision, dtype or DTYPE[precision], geometry, target, splits, **changes)


def name(value: Any) -> str:
    if isinstance(value, Tile):
        return f"{value.pixels}x{value.outputs}x{value.depth}-w{value.warps}-s{value.stages}"
    return str(value)


@pytest.mark.parametrize(("target", "precision", "tile"), SHIPPED, ids=name)
def test_every_shipped_tile_is_sound(
    facts: dict[tuple[Any, ...], Future[Facts]], target: str, precision: str, tile: Tile
) -> None:
    assert faults(facts["gather", target, precision, tile].result(), precision) == []


BITMASK = [
    (target, precision, adapt(tile, tile.depth, 9, target))
    for target in ("cuda:80", "cuda:90")
    for (precision, *_), tile in BITMASK_CONFIGS.items()
]


@pytest.mark.parametrize(("target", "precision", "tile"), BITMASK, ids=name)
def test_every_tile_of_the_bitmask_kernel_is_sound(
    facts: dict[tuple[Any, ...], Future[Facts]], target: str, precision: str, tile: Tile
) -> None:
    assert faults(facts["bitmask", target, precision, tile].result(), precision, look_ups=2) == []


LARGEST, USUAL = CONFIGS["16", 128][0], CONFIGS["16", 64][0]
VARIANTS: dict[str, tuple[Tile, dict[str, Any]]] = {
    "7x7": (LARGEST, {"geometry": "7x7"}),
    "narrow blocks, edge rows": (LARGEST, {"EW": 8, "RUN": 8, "FULL": False}),
    "bfloat16": (USUAL, {"dtype": "bf16"}),
    "1x1": (USUAL, {"geometry": "1x1"}),
    "split": (USUAL, {"splits": 4}),
    "silu": (USUAL, {"ACTIVATION": "silu"}),
    "no epilogue": (USUAL, {"HAS_BIAS": False, "HAS_RESIDUAL": False, "ACTIVATION": "none"}),
}


@pytest.mark.parametrize(("tile", "variant"), VARIANTS.values(), ids=VARIANTS)
def test_variants_are_sound(tile: Tile, variant: dict[str, Any]) -> None:
    arguments = {"geometry": "3x3", **variant}
    assert faults(shipped(tile, "16", target="cuda:90", **arguments), "16") == []


@pytest.mark.parametrize("precision", ["16", "tf32", "ieee"])
def test_half_the_depth_is_sound(precision: str) -> None:
    tile = CONFIGS[precision, 128][0]
    tile = replace(tile, depth=tile.depth // 2)
    assert faults(shipped(tile, precision, "3x3", "cuda:90"), precision) == []


def test_stages_buy_buffers() -> None:
    tile = Tile(128, 64, 64, 4, 4, True)
    shared = shipped(tile, "16", "1x1", "cuda:90").shared
    assert shared >= 4 * (128 + 64) * 64 * 2


def test_weights_first_makes_one_instruction_cover_more_outputs() -> None:
    first = shipped(Tile(128, 64, 64, 4, 3, True), "16", "1x1", "cuda:90")
    second = shipped(Tile(128, 64, 64, 4, 3, False), "16", "1x1", "cuda:90")
    assert 2 * first.mix()["HGMMA"] == second.mix()["HGMMA"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_sum_of_splits_does_not_spill(target: str) -> None:
    pointers = {"partial_ptr": "*fp32", "bias_ptr": "*fp16", "residual_ptr": "*fp16", "y_ptr": "*fp16"}
    constants = {
        "O": 256,
        "SPLITS": 8,
        "HAS_BIAS": True,
        "HAS_RESIDUAL": True,
        "ACTIVATION": "relu",
        "BLOCK": triton_epilogue.BLOCK,
    }
    scalars = {"elements": "i32", "slope": "fp32"}
    facts = compile_kernel(triton_epilogue.reduce_kernel, pointers, scalars, constants, 4, 3, target)
    assert facts.spills == 0


# From here on: kernels with a fault that must be found.


@triton.jit  # type: ignore[untyped-decorator]
def branching(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, y_ptr, n, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """A product under a branch, which Triton does not pipeline by itself."""
    m, k, o = tl.arange(0, BM), tl.arange(0, BK), tl.arange(0, BN)
    acc = tl.full((BM, BN), 0.0, tl.float32)
    for i in range(n):
        x = tl.load(x_ptr + i * BM * BK + m[:, None] * BK + k[None, :])
        w = tl.load(w_ptr + i * BN * BK + o[:, None] * BK + k[None, :])
        if i % 3 != 0:
            acc = tl.dot(x, tl.trans(w), acc)
    tl.store(y_ptr + m[:, None] * BN + o[None, :], acc)


def found(facts: Facts, precision: str = "16", **arguments: Any) -> str:
    return "; ".join(faults(facts, precision, **arguments))


def test_spills_are_found() -> None:
    tile = Tile(128, 128, 32, 4, 3, True, ".ca")
    assert "spills" in found(compile_gather(tile, "tf32", "fp32", "3x3", "cuda:90"), "tf32")


def test_missing_matrix_instructions_are_found() -> None:
    facts = compile_gather(Tile(64, 16, 32, 4, 3, False), "ieee", "fp32", "1x1", "cuda:90")
    assert "no HGMMA instruction" in found(facts, "tf32")


def test_a_loop_without_a_pipeline_is_found() -> None:
    pointers = {"x_ptr": "*fp16", "w_ptr": "*fp16", "y_ptr": "*fp32"}
    constants = {"BM": 128, "BN": 64, "BK": 64}
    facts = compile_kernel(branching, pointers, {"n": "i32"}, constants, 4, 3, "cuda:90")
    assert "not pipelined" in found(facts)
    assert "stores to shared memory" in found(facts)


def test_narrow_copies_are_found() -> None:
    facts = compile_gather(Tile(64, 32, 64, 4, 3, False), "16", "fp16", "1x1", "cuda:90", EW=4)
    assert "copies narrower than 16 bytes" in found(facts)


@pytest.mark.parametrize("target", TARGETS)
def test_too_much_shared_memory_is_found(target: str) -> None:
    facts = Facts(target, 128, 0, SHARED_LIMIT[target] + 1, 1, -1, ())
    assert "bytes of shared memory" in found(facts)


def test_a_missing_barrier_is_found() -> None:
    loop = ("HGMMA.64x128x16.F32", "WARPGROUP.DEPBAR.LE", "LDGSTS.E.BYPASS.128", "BRA")
    facts = Facts("cuda:90", 128, 0, 1024, 1, 4, loop)
    assert "no barrier" in found(facts)
    with_barrier = replace(facts, loop=(*loop[:2], "BAR.SYNC.DEFER_BLOCKING", *loop[2:]))
    assert found(with_barrier) == ""


def test_amd_spills_are_found() -> None:
    text = ".vgpr_spill_count: 3\n.private_segment_fixed_size: 8\n.vgpr_count: 256\nv_mfma_f32"
    assert "11 spills" in found(triton_offline._read_amd(text, 0, "hip:gfx942"))
