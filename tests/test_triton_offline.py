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

from fxdbsr.kernels import triton_epilogue  # noqa: E402
from fxdbsr.kernels.triton_configs import Tile, tiles, triton_version  # noqa: E402
from fxdbsr.kernels.triton_machine_code import MATRIX, SHARED_LIMIT, Facts, faults, read_amd  # noqa: E402
from fxdbsr.kernels.triton_offline import (  # noqa: E402
    TARGETS,
    Shipped,
    compile_gather,
    compile_kernel,
    half_depth,
    shipped,
)

SHIPPED = [entry for target in TARGETS for entry in shipped(target, ("3x3",))]
USUAL = next(entry for entry in SHIPPED if str(entry).startswith("cuda:90-gather-16-3x3-128x64x64"))
LARGEST = next(entry for entry in SHIPPED if str(entry).startswith("cuda:90-gather-16-3x3-128x128x64"))
HALF = [half for entry in SHIPPED if entry.target == "cuda:90" and entry.lanes == 64 and (half := half_depth(entry))]


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
def facts(compiled_anew: None) -> Iterator[dict[Shipped, Future[Facts]]]:
    """All shipped tiles, compiled side by side: the disassembler takes half of the time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {entry: pool.submit(entry.compile) for entry in SHIPPED}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("entry", SHIPPED, ids=str)
def test_every_shipped_tile_is_sound(facts: dict[Shipped, Future[Facts]], entry: Shipped) -> None:
    assert entry.faults(facts[entry].result()) == []


def test_every_tile_of_the_tables_is_compiled() -> None:
    for target in TARGETS:
        for precision, full in (("16", 64), ("tf32", 32), ("ieee", 32), ("3xtf32", 32)):
            listed = {tile for lanes in (16, 32, 64, 128) for tile in tiles(target, precision, lanes, full, 9)}
            assert listed == {
                e.tile for e in SHIPPED if (e.target, e.kernel, e.precision) == (target, "gather", precision)
            }


VARIANTS: dict[str, tuple[Shipped, dict[str, Any]]] = {
    "7x7": (replace(LARGEST, geometry="7x7"), {}),
    "1x1": (replace(USUAL, geometry="1x1", tile=replace(USUAL.tile, cache="", copy=16)), {}),
    "narrow blocks, edge rows": (LARGEST, {"EW": 8, "RUN": 8, "FULL": False}),
    "bfloat16": (USUAL, {"dtype": "bf16"}),
    "split": (USUAL, {"splits": 4}),
    "lanes of a taller table": (USUAL, {"LANES": 128}),
    "silu": (USUAL, {"ACTIVATION": "silu"}),
    "a pool behind it": (USUAL, {"POOL": 2, "HAS_RESIDUAL": False}),
    "a pool behind the largest": (LARGEST, {"POOL": 2, "HAS_RESIDUAL": False}),
    "no epilogue": (USUAL, {"HAS_BIAS": False, "HAS_RESIDUAL": False, "ACTIVATION": "none"}),
}


@pytest.mark.parametrize(("entry", "variant"), VARIANTS.values(), ids=VARIANTS)
def test_variants_are_sound(entry: Shipped, variant: dict[str, Any]) -> None:
    assert entry.faults(entry.compile(**variant)) == []


@pytest.mark.parametrize("entry", HALF, ids=str)
def test_half_the_depth_is_sound(entry: Shipped) -> None:
    assert entry.faults(entry.compile()) == []


def ptx(entry: Shipped) -> str:
    """What Triton hands to the assembler for `entry`."""
    compile = triton.compile
    made: list[str] = []

    def keep(*args: Any, **options: Any) -> Any:
        compiled = compile(*args, **options)
        made.append(compiled.asm["ptx"])
        return compiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "compile", keep)
        entry.compile()
    return made[0]


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_kernels_start_before_the_last_one_ends_on_sm_90_alone(target: str) -> None:
    text = ptx(next(entry for entry in SHIPPED if (entry.target, entry.kernel) == (target, "gather")))
    wait, start = (text.find(f"griddepcontrol.{name};") for name in ("wait", "launch_dependents"))
    if target == "cuda:80":
        assert wait == start == -1
    else:
        assert -1 < wait < text.find("mma") < start
        assert text.find("cp.async") > wait  # activations may be what the kernel ahead writes


def test_one_product_of_the_bitmask_kernel_is_under_no_branch_on_sm_90(facts: dict[Shipped, Future[Facts]]) -> None:
    for entry in SHIPPED:
        if (entry.target, entry.kernel) == ("cuda:90", "bitmask"):
            assert facts[entry].result().mix()["BRA"] == 3 + 1  # three products, and the next step


def test_3xtf32_adds_each_step_outside_of_the_matrix_unit(facts: dict[Shipped, Future[Facts]]) -> None:
    for target in ("cuda:80", "cuda:90"):
        of = {e.tile.outputs: facts[e].result() for e in SHIPPED if (e.target, e.precision) == (target, "3xtf32")}
        narrow, wide = (of[outputs].mix()["FADD"] for outputs in (16, 32))
        assert wide - narrow == 64 * (32 - 16) // 128  # one for each sum of a thread; the others split activations


def test_stages_buy_buffers() -> None:
    tile = Tile(128, 64, 64, 4, 4, True)
    assert compile_gather(tile, "16", "fp16", "1x1", "cuda:90").shared >= 4 * (128 + 64) * 64 * 2


def test_weights_first_makes_one_instruction_cover_more_outputs() -> None:
    first = compile_gather(Tile(128, 64, 64, 4, 3, True), "16", "fp16", "1x1", "cuda:90")
    second = compile_gather(Tile(128, 64, 64, 4, 3, False), "16", "fp16", "1x1", "cuda:90")
    assert 2 * first.mix()["HGMMA"] == second.mix()["HGMMA"]


def test_the_look_ahead_costs_no_buffers(facts: dict[Shipped, Future[Facts]]) -> None:
    tile = USUAL.tile
    assert facts[USUAL].result().shared >= tile.stages * (tile.pixels + tile.outputs) * tile.depth * 2


@pytest.mark.parametrize("target", TARGETS)
def test_the_sum_of_splits_compiles(target: str) -> None:
    pointers = {"partial_ptr": "*fp32", "bias_ptr": "*fp16", "residual_ptr": "*fp16", "y_ptr": "*fp16"}
    constants = {"O": 256, "SPLITS": 4, "HAS_BIAS": True, "HAS_RESIDUAL": True, "ACTIVATION": "relu", "BLOCK": 1024}
    scalars = {"elements": "i32", "slope": "fp32"}
    found = compile_kernel(triton_epilogue.reduce_kernel, pointers, scalars, constants, 4, 1, target)
    assert found.spills == 0


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
    assert "no HGMMA instruction, but none" in found(facts, "tf32")


def test_a_slower_matrix_instruction_is_found() -> None:
    facts = compile_gather(Tile(128, 32, 64, 4, 4, True), "16", "fp16", "1x1", "cuda:90")
    assert "no HGMMA instruction, but HMMA" in found(facts)
    assert found(facts, matrix="HMMA") == ""


def test_a_loop_without_a_pipeline_is_found() -> None:
    pointers = {"x_ptr": "*fp16", "w_ptr": "*fp16", "y_ptr": "*fp32"}
    constants = {"BM": 128, "BN": 64, "BK": 64}
    facts = compile_kernel(branching, pointers, {"n": "i32"}, constants, 4, 3, "cuda:90")
    assert "not pipelined" in found(facts)
    assert "stores to shared memory" in found(facts)


def test_narrow_copies_are_found() -> None:
    facts = compile_gather(Tile(64, 32, 64, 4, 3, False), "16", "fp16", "1x1", "cuda:90", COPY=4)
    assert "copies narrower than 16 bytes" in found(facts)
    assert "copies narrower" not in found(facts, copy_bytes=8)


def test_copies_past_l1_are_found() -> None:
    facts = compile_gather(Tile(64, 32, 64, 4, 3, False), "16", "fp16", "1x1", "cuda:90")
    assert found(facts, through_l1=True) == "all copies go past L1"


def test_copies_of_8_bytes_go_through_l1() -> None:
    facts = compile_gather(Tile(128, 64, 64, 4, 3, True, ".ca", 8), "16", "fp16", "3x3", "cuda:90")
    assert found(facts, copy_bytes=8, through_l1=True) == ""


@pytest.mark.skipif(triton_version() != (3, 8), reason="other versions keep the operand in registers")
def test_an_operand_that_is_stored_first_is_found() -> None:
    facts = compile_gather(Tile(64, 32, 32, 4, 3, True), "3xtf32", "fp32", "1x1", "cuda:90", ONCE=False)
    assert "stores to shared memory" in found(facts, "3xtf32", matrix="HMMA")


@pytest.mark.skipif(triton_version() >= (3, 8), reason="newer versions carry an assembler without this error")
def test_an_address_made_under_another_branch_is_found() -> None:
    entry = next(e for e in SHIPPED if (e.target, e.kernel, e.tile.warps) == ("cuda:90", "bitmask", 4))
    assert "reads where not every way to it says" in "; ".join(entry.faults(entry.compile(FIRST=False)))


def test_unsettled_addresses_are_a_fault() -> None:
    facts = Facts("cuda:80", 128, 0, 1024, "HMMA", 2, ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128"), ("a sentence",))
    assert found(facts) == "a sentence"


@pytest.mark.parametrize("target", TARGETS)
def test_too_much_shared_memory_is_found(target: str) -> None:
    facts = Facts(target, 128, 0, SHARED_LIMIT[target] + 1, MATRIX[target][0], -1, ())
    assert "bytes of shared memory" in found(facts)


def test_a_missing_barrier_is_found() -> None:
    loop = ("HGMMA.64x128x16.F32", "WARPGROUP.DEPBAR.LE", "LDGSTS.E.BYPASS.128", "BRA")
    facts = Facts("cuda:90", 128, 0, 1024, "HGMMA", 4, loop)
    assert "no barrier" in found(facts)
    with_barrier = replace(facts, loop=(*loop[:2], "BAR.SYNC.DEFER_BLOCKING", *loop[2:]))
    assert found(with_barrier) == ""
    late = replace(facts, loop=(loop[2], *loop[:2], "BRA"))  # the copy of the next step
    assert "no barrier" in found(late)
    assert "no barrier" in found(replace(facts, loop=(*with_barrier.loop[:-1], *loop)))
    assert "no wait" in found(replace(facts, loop=(loop[0], *loop[2:])))


def test_amd_spills_are_found() -> None:
    text = ".vgpr_spill_count: 3\n.private_segment_fixed_size: 8\n.vgpr_count: 256\nv_mfma_f32"
    assert "11 spills" in found(read_amd(text, 0, "hip:gfx942"))


def test_amd_kernels_without_matrix_instructions_are_found() -> None:
    text = ".vgpr_spill_count: 0\n.private_segment_fixed_size: 0\n.vgpr_count: 256\nv_fma_f32"
    assert found(read_amd(text, 0, "hip:gfx942")) == "no v_mfma instruction, but none"
