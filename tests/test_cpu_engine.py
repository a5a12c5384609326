"""The CPU engine against the float64 reference, and its safety: threads, forks, cache, wrong arguments."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import stat
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("llvmlite")

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels import cache as disk
from fxdbsr.kernels import cpu, cpu_call, cpu_program, jit, ops, reference
from fxdbsr.kernels.cpu_conv import Conv
from fxdbsr.kernels.cpu_cuts import code_of, image_tile, register_tile, task_table
from fxdbsr.kernels.cpu_images import Copy, Pool, copy_step, pool_step
from fxdbsr.kernels.cpu_layout import Layout
from fxdbsr.kernels.cpu_plan import Geometry, packed_input
from fxdbsr.kernels.cpu_steps import TASK, conv_step
from fxdbsr.kernels.geometry import ACTIVATIONS

TARGET = jit.host()
pytestmark = pytest.mark.skipif(TARGET is None, reason="no vector unit that the engine knows")
BFLOAT16 = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(not (TARGET and TARGET.bfloat16), reason="needs avx512_bf16")
)
AVX2_TOO = pytest.mark.parametrize("target", [TARGET, TARGET and jit.host(False)], ids=["widest", "avx2"])
NEON = jit.target_of("aarch64-unknown-linux-gnu", "neoverse-n1", {})


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor fill the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXDBSR_CACHE", str(tmp_path_factory.mktemp("code")))
        yield


@dataclass(frozen=True)
class Case:
    """A conv; sizes as (rows, columns)."""

    channels: tuple[int, int] = (64, 64)
    kernel: tuple[int, int] = (1, 1)
    size: tuple[int, int] = (9, 9)
    block: tuple[int, int] = (32, 32)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    batch: int = 1
    density: float = 0.5
    bias: bool = True
    residual: bool = False
    activation: str = "none"
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        same = Case()
        return "-".join(f"{k}{v}" for k, v in vars(self).items() if v != getattr(same, k)).replace(" ", "")


@dataclass(frozen=True)
class Arguments:
    """The tensors and numbers of a call."""

    input: Tensor
    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    bias: Tensor | None
    residual: Tensor | None
    numbers: tuple[Any, ...]

    @property
    def all(self) -> tuple[Any, ...]:
        return (*self.tensors(), self.tables(jit.host()), *self.numbers)

    def tables(self, target: Any) -> list[Tensor]:
        """The weights in the order of `target`."""
        in_channels, out_channels, *_, groups, _, _ = self.numbers
        _, bo, bc, *kernel = self.values.shape
        return cpu.ordered(BlockGrid(out_channels, in_channels, tuple(kernel), groups, (bo, bc)), self.values, target)

    def tensors(self) -> tuple[Any, ...]:
        return (self.input, self.values, self.crow_indices, self.col_indices, self.bias, self.residual)

    def run(self, target: jit.Target | None = TARGET) -> Tensor:
        return cpu.conv(*self.tensors(), self.tables(target), *self.numbers, target=target)  # type: ignore[misc, call-arg]

    def expected(self, dtype: torch.dtype | None = None) -> Tensor:
        tensors = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in self.tensors()]
        return reference.conv(*(*tensors, [], *self.numbers))


def arguments(case: Case, seed: int = 0, keep: Tensor | None = None) -> Arguments:
    torch.manual_seed(seed)
    C, out = case.channels
    weight = torch.randn(out, C // case.groups, *case.kernel).to(case.dtype)
    grid = BlockGrid.of(tuple(weight.shape), case.block, case.groups)
    assert cpu.why_not(grid, case.stride, case.padding, case.dilation, case.dtype) is None
    values, crow, col = grid.pack(weight, torch.rand(grid.shape) < case.density if keep is None else keep)
    cpu.tables(grid, values, crow, col, case.stride, case.padding, case.dilation)
    numbers = (
        *(C, out, case.stride, case.padding, case.dilation),
        *(case.groups, case.activation, 0.1),
    )
    x = torch.randn(case.batch, C, *case.size).to(case.dtype).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(out).to(case.dtype) if case.bias else None
    given = Arguments(x, cpu.layout(values), crow, col, bias, None, numbers)
    if case.residual:
        residual = torch.randn(given.expected().shape).to(case.dtype)
        given = replace(given, residual=residual.contiguous(memory_format=torch.channels_last))
    return given


def check(given: Arguments, target: jit.Target | None = TARGET) -> None:
    """Error at most twice eager's own and one unit in the last place of the largest output.

    As root mean square; the single largest error of few outputs is luck and gets twice that bound.
    """
    exact = given.expected(torch.float64)
    eager = given.expected().double() - exact
    output = given.run(target)
    assert output.shape == exact.shape
    assert output.dtype == given.input.dtype
    assert output.is_contiguous(memory_format=torch.channels_last)
    ulp = exact.abs().max() * torch.finfo(output.dtype).eps
    error = output.double() - exact
    assert error.square().mean().sqrt() <= 2 * eager.square().mean().sqrt() + ulp
    assert error.abs().max() <= 4 * eager.abs().max() + 2 * ulp


CASES = [
    Case(),
    Case(size=(14, 14), channels=(256, 64), density=0.3),
    Case(size=(7, 7), channels=(64, 128), batch=3, block=(128, 64)),
    Case(size=(1, 1), channels=(64, 96)),
    Case(size=(3, 5), channels=(1024, 64)),
    Case(size=(15, 8), stride=(2, 2), channels=(64, 96)),
    Case(size=(15, 8), stride=(3, 1), channels=(1024, 32)),
    Case(padding=(1, 2), bias=False),
    Case(kernel=(3, 3), padding=(1, 1), size=(7, 7), batch=2),
    Case(kernel=(3, 3), padding=(1, 1), size=(14, 14), residual=True, activation="relu"),
    Case(kernel=(3, 3), padding=(1, 1), size=(30, 29), stride=(2, 2)),
    Case(kernel=(3, 3), size=(5, 30)),
    Case(kernel=(3, 3), padding=(2, 2), dilation=(2, 2), size=(13, 9), block=(16, 16)),
    Case(kernel=(3, 2), padding=(4, 3), dilation=(1, 3), size=(6, 5), block=(8, 8)),
    Case(kernel=(5, 7), padding=(2, 3), size=(9, 11), block=(24, 16), channels=(80, 96)),
    Case(kernel=(7, 7), padding=(3, 3), stride=(2, 2), size=(33, 31), channels=(3, 64), density=1.0),
    Case(
        kernel=(7, 7),
        padding=(3, 3),
        stride=(2, 2),
        size=(33, 31),
        channels=(3, 32),
        block=(16, 3),
        density=1.0,
    ),
    Case(kernel=(1, 5), padding=(0, 2), size=(9, 17)),
    Case(kernel=(3, 3), padding=(1, 1), channels=(40, 40), residual=True),
    Case(channels=(40, 72), residual=True),
    Case(channels=(37, 45), block=(13, 9), kernel=(3, 3), padding=(1, 1)),
    Case(channels=(33, 10), block=(10, 33)),
    Case(block=(8, 8), channels=(64, 72)),
    Case(block=(8, 9), channels=(45, 64)),
    Case(block=(16, 8), channels=(64, 80), kernel=(3, 3), padding=(1, 1)),
    Case(block=(64, 16), channels=(64, 128)),
    Case(groups=2, kernel=(3, 3), padding=(1, 1), block=(16, 32), channels=(128, 64)),
    Case(groups=4, block=(16, 8), channels=(48, 96), batch=2),
    Case(groups=8, kernel=(3, 3), padding=(1, 1), channels=(128, 128), block=(16, 16)),
    Case(groups=2, channels=(40, 40), block=(16, 16), residual=True),
    Case(batch=5, size=(1, 2)),
]


GROUPS = [
    Case(groups=64, kernel=(3, 3), padding=(1, 1)),
    Case(groups=64, kernel=(5, 5), padding=(2, 2), stride=(2, 2), size=(12, 11), residual=True, activation="relu6"),
    Case(groups=16, kernel=(3, 3), padding=(1, 1)),
    Case(groups=8, channels=(64, 32), kernel=(3, 1), padding=(1, 0), batch=2),
    Case(groups=4, channels=(32, 64), block=(32, 32)),
    Case(groups=20, channels=(60, 40), kernel=(3, 3), density=0.7),
    Case(groups=2, channels=(64, 64), block=(64, 32), density=1.0),
]


@AVX2_TOO
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("case", GROUPS, ids=lambda c: c.name)
def test_blocks_of_whole_groups_equal_the_reference(case: Case, dtype: torch.dtype, target: jit.Target) -> None:
    if dtype == torch.bfloat16 and not target.bfloat16:
        pytest.skip("no bfloat16 without AVX-512")
    check(arguments(replace(case, dtype=dtype)), target)


@AVX2_TOO
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float32_equals_the_reference(case: Case, target: jit.Target) -> None:
    check(arguments(case), target)


@AVX2_TOO
def test_rows_that_tiles_leave_over_have_code_of_their_own(target: jit.Target) -> None:
    base = Case(kernel=(3, 3), padding=(1, 1), channels=(64, 72), residual=True, batch=2)
    cases = [replace(base, size=size) for size in ((3, 3), (5, 4), (7, 3), (11, 2), (7, 7))]
    left = [case for case in cases if (made := code(case, target)).out[0] % made.tile[0]]
    assert len(left) >= 2
    for case in left:
        made = code(case, target)
        assert made.last.tile == (made.out[0] % made.tile[0], made.tile[1])
        check(arguments(case), target)


@pytest.mark.skipif(not (TARGET and TARGET.bfloat16), reason="needs avx512_bf16")
@pytest.mark.parametrize("tiles", [False, True], ids=["dots", "tiles"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_bfloat16_equals_the_reference(case: Case, tiles: bool) -> None:
    target = jit.host(amx=tiles)
    if target is None or target.tiles != tiles:
        pytest.skip("the CPU has no tile registers (AMX)")
    check(arguments(replace(case, dtype=torch.bfloat16)), target)


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_epilogue(activation: str, residual: bool, dtype: torch.dtype) -> None:
    check(arguments(Case(activation=activation, residual=residual, dtype=dtype, size=(5, 5))))


@AVX2_TOO
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_pass_as_in_torch(activation: str, target: jit.Target) -> None:
    given = arguments(Case(activation=activation, residual=True, size=(4, 4)))
    assert given.residual is not None
    given.residual[0, :3, 0, 0] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    torch.testing.assert_close(given.run(target), given.expected(), equal_nan=True)


@pytest.mark.parametrize("kernel", [1, 3])
def test_empty_rows_and_columns_give_bias(kernel: int) -> None:
    case = Case(channels=(96, 96), kernel=(kernel, kernel), padding=(kernel // 2, kernel // 2))
    keep = torch.tensor([[0, 1, 0], [0, 0, 0], [0, 1, 0]]).bool()
    check(arguments(case, keep=keep))
    nothing = arguments(case, keep=torch.zeros(3, 3).bool())
    assert len(nothing.values) == 0
    assert nothing.bias is not None
    assert torch.equal(nothing.run(), nothing.bias[:, None, None].expand(1, 96, 9, 9))
    check(arguments(replace(case, density=1.0)))


@pytest.mark.parametrize("case", [CASES[4], CASES[9], CASES[18], CASES[26]], ids=lambda c: c.name)
def test_every_element_is_written_and_padding_stays_zero(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that `torch.empty` returns, output and scratch, starts as NaN."""
    empty, empty_strided = torch.empty, torch.empty_strided

    def scratch(*size: Any, **options: Any) -> Tensor:
        return empty(*size, **options).fill_(255)

    def output(*size: Any, **options: Any) -> Tensor:
        return empty_strided(*size, **options).fill_(float("nan"))

    given = arguments(case)
    monkeypatch.setattr(torch, "empty", scratch)
    monkeypatch.setattr(torch, "empty_strided", output)
    monkeypatch.setattr(cpu, "_own", type(cpu._own)())
    result = given.run()
    monkeypatch.undo()
    torch.testing.assert_close(result, given.expected(), rtol=1e-4, atol=1e-4)


def test_channels_beyond_a_group_are_not_read() -> None:
    """A weight of zero in an edge block's padding must not meet what lies beyond the group."""
    given = arguments(Case(groups=2, channels=(40, 40), block=(16, 16), density=1.0))
    given.input[:, 20:] = float("nan")
    assert given.run()[:, :20].isfinite().all()


@pytest.mark.parametrize("case", [Case(size=(13, 13)), CASES[8], CASES[25]], ids=lambda c: c.name)
def test_result_is_the_same_bit_for_bit_with_any_number_of_threads(case: Case) -> None:
    given = arguments(case)
    threads, outputs = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7, 2):
            torch.set_num_threads(n)
            outputs.append(given.run())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(outputs[0], output) for output in outputs)


def test_ten_thousand_calls_from_eight_threads() -> None:
    given = [arguments(Case(kernel=(3, 3), padding=(1, 1), size=(4, 4)), seed) for seed in range(8)]
    given = [replace(given[0], input=one.input) for one in given]
    expected = [one.run() for one in given]

    def wrong(i: int) -> int:
        return sum(not torch.equal(given[i].run(), expected[i]) for _ in range(1250))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(wrong, range(8))) == 0


def _same_in_child(given: Arguments, expected: Tensor, queue: Any) -> None:
    output = given.run()
    torch.set_num_threads(1)  # torch itself would wait for its lost threads
    queue.put(torch.equal(output, expected))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_child_runs_serially_and_right() -> None:
    given = arguments(Case(size=(31, 31), channels=(64, 128)))
    expected = given.run()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_same_in_child, args=(given, expected, queue))
    child.start()
    child.join(30)
    child.kill()
    assert child.exitcode == 0
    assert queue.get()


def test_input_and_residual_may_have_any_strides() -> None:
    given = arguments(Case(residual=True, batch=2))
    expected = given.run()
    assert given.residual is not None
    odd = replace(
        given,
        input=torch.stack([given.input, given.input], -1)[..., 0],
        residual=given.residual.contiguous(),
    )
    assert torch.equal(odd.run(), expected)


def test_layout_keeps_the_entries_and_survives_copies() -> None:
    values = torch.randn(3, 8, 16, 3, 5)
    packed = cpu.layout(values)
    assert torch.equal(packed, values)
    for copy in (packed.clone(), packed.double().float(), cpu.layout(packed)):
        assert copy.stride() == packed.stride() == (3 * 5 * 16 * 8, 1, 8, 5 * 16 * 8, 16 * 8)


WRONG: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("input", TypeError, {"input": torch.randn(1, 64, 9, 9).double()}),
    ("input", TypeError, {"input": torch.randn(1, 64, 9, 9).to(torch.complex64)}),
    ("input", ValueError, {"input": torch.randn(1, 63, 9, 9)}),
    ("input", ValueError, {"input": torch.randn(64, 9, 9)}),
    ("input", ValueError, {"input": torch.empty(1, 64, 9, 9, device="meta")}),
    ("input", ValueError, {"input": torch.randn(1, 64, 0, 9)}),
    ("values", ValueError, {"values": torch.randn(2, 32, 32, 1, 1)}),
    ("values", ValueError, {"values": torch.randn(2, 32, 32)}),
    ("float32 and bfloat16", ValueError, {"values": torch.zeros(0, 32, 32, 1, 1).double()}),
    ("crow_indices", TypeError, {"crow_indices": torch.zeros(3, dtype=torch.int64)}),
    ("crow_indices", ValueError, {"crow_indices": torch.zeros(4, dtype=torch.int32)}),
    ("crow_indices", ValueError, {"crow_indices": torch.zeros(6, dtype=torch.int32)[::2]}),
    ("col_indices", ValueError, {"col_indices": torch.zeros(9, dtype=torch.int32)}),
    ("bias", TypeError, {"bias": torch.zeros(64, dtype=torch.int32)}),
    ("bias", ValueError, {"bias": torch.zeros(63)}),
    ("bias", ValueError, {"bias": torch.zeros(128)[::2]}),
    ("residual", ValueError, {"residual": torch.zeros(1, 64, 9, 8)}),
    ("residual", TypeError, {"residual": torch.zeros(1, 64, 9, 9).double()}),
]


@pytest.mark.parametrize(("name", "error", "change"), WRONG)
def test_wrong_argument_is_named(name: str, error: type[Exception], change: dict[str, Any]) -> None:
    with pytest.raises(error, match=name):
        replace(arguments(Case()), **change).run()


def test_wrong_indices_do_not_read_outside() -> None:
    given = arguments(Case(channels=(64, 64), density=1.0))
    wild = torch.tensor([0, 1 << 30, -5], dtype=torch.int32)
    replace(given, crow_indices=wild).run()
    replace(given, col_indices=torch.tensor([-1, 1 << 30, 7, 0], dtype=torch.int32)).run()


@pytest.mark.parametrize(
    ("crow", "col", "name"),
    [([1, 2, 4], [0, 1, 0, 1], "crow"), ([0, 3, 2], [0, 1], "crow"), ([0, 2, 4], [0, 2, 0, 1], "col")],
)
def test_tables_refuse_wrong_indices(crow: list[int], col: list[int], name: str) -> None:
    grid = BlockGrid.of((64, 64, 1, 1), (32, 32))
    crow_indices, col_indices = (torch.tensor(t, dtype=torch.int32) for t in (crow, col))
    values = torch.zeros(len(col), 32, 32, 1, 1)
    with pytest.raises(ValueError, match=f"{name}_indices"):
        cpu.tables(grid, values, crow_indices, col_indices, (1, 1), (0, 0), (1, 1))


def test_empty_batch_and_gradients() -> None:
    given = arguments(Case())
    assert replace(given, input=given.input[:0]).run().shape == (0, 64, 9, 9)
    assert not replace(given, input=given.input.requires_grad_()).run().requires_grad


@pytest.mark.parametrize(
    ("grid", "dtype", "reason"),
    [
        (BlockGrid.of((64, 64, 1, 1), (32, 32)), torch.float64, "float32 and bfloat16"),
        (BlockGrid.of((64, 64, 3), (32, 32)), torch.float32, "2-d"),
        (BlockGrid.of((64, 64, 3, 3), (32, 32), transposed=True), torch.float32, "transposed"),
        (BlockGrid.of((64, 64, 3, 3), (64, 64), groups=2), torch.float32, "at most 32 inputs"),
        (BlockGrid.of((4, 20, 1, 1), (8, 8), groups=2), torch.float32, "not all of at most 32 inputs"),
        (BlockGrid.of((256, 256, 1, 1), (256, 32)), torch.float32, "larger than 128"),
        (BlockGrid.of((64, 64, 9, 9), (32, 32)), torch.float32, "larger than 7"),
    ],
)
def test_refusals_say_why(grid: BlockGrid, dtype: torch.dtype, reason: str) -> None:
    said = cpu.why_not(grid, (1, 1), (0, 0), (1, 1), dtype)
    assert said is not None
    assert reason in said


def geometry(case: Case) -> Geometry:
    weight_shape = (case.channels[1], case.channels[0] // case.groups, *case.kernel)
    grid = BlockGrid.of(weight_shape, case.block, case.groups)
    bfloat16 = case.dtype == torch.bfloat16
    return Geometry(grid, case.stride, case.padding, case.dilation, bfloat16, case.bias, case.activation, 0.1)


def code(case: Case, target: jit.Target) -> Conv:
    """The code of a conv between its best layout and channels last."""
    conv = geometry(case)
    x, y = packed_input(conv, target, case.size), Layout.channels_last(case.channels[1], conv.out(case.size))
    return code_of(conv, target, x, y, y if case.residual else None, case.batch)[0]


@pytest.mark.parametrize("case", [Case(), *CASES[8:12], CASES[20], GROUPS[0]], ids=lambda c: c.name)
def test_neon_code_compiles_offline(case: Case) -> None:
    assert NEON is not None
    text = conv_step(code(case, NEON))
    assert "<4 x float>" in text
    assert jit.object_code(text, NEON).startswith(b"\x7fELF")


def test_neon_copies_and_pools_compile_offline() -> None:
    assert NEON is not None
    x, y = Layout.channels_last(40, (9, 9)), Layout(40, (9, 9), 16, 16, (1, 1))
    for bfloat16 in (False, True):
        for text in (
            copy_step(Copy(NEON, bfloat16, x, y)),
            pool_step(Pool(NEON, bfloat16, "max", (3, 3), (2, 2), (1, 1), (5, 5), x, replace(x, size=(5, 5)))),
        ):
            assert jit.object_code(text, NEON).startswith(b"\x7fELF")


@pytest.mark.parametrize("cpu_name", ["sapphirerapids", "znver4"])
def test_bfloat16_code_compiles_offline_with_and_without_tiles(cpu_name: str) -> None:
    names = ["avx512f", "avx512bf16", "avx512vl", "avx512bw", "avx512dq"]
    names += ["amx-tile", "amx-bf16"] if cpu_name == "sapphirerapids" else []
    target = jit.target_of("x86_64-unknown-linux-gnu", cpu_name, dict.fromkeys(names, True))
    assert target is not None
    text = conv_step(code(replace(CASES[9], dtype=torch.bfloat16), target))
    assert ("tdpbf16ps" in text) == target.tiles == (cpu_name == "sapphirerapids")
    assert ("dpbf16ps.512" in text.split("define", 1)[1]) != target.tiles
    assert jit.object_code(text, target).startswith(b"\x7fELF")


def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FXDBSR_CACHE", str(folder))
    disk._said.clear()
    forget()
    return folder


def forget() -> None:
    """Forget all that was compiled in this process."""
    for kept in (
        jit._load,
        cpu_call.planned,
        *(getattr(cpu_program, f"_compiled_{kind}") for kind in ("conv", "copy", "pool")),
    ):
        kept.cache_clear()


def test_cache_is_private_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _cache(tmp_path, monkeypatch)
    given = arguments(Case())
    expected = given.run()
    entries = sorted(folder.iterdir())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    _cache(tmp_path, monkeypatch)
    monkeypatch.setattr(jit, "object_code", lambda *_: pytest.fail("compiled again"))
    assert torch.equal(given.run(), expected)
    assert entries == sorted(folder.iterdir())


def test_corrupt_cache_entries_are_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _cache(tmp_path, monkeypatch)
    given = arguments(Case())
    expected = given.run()
    entries = {entry: entry.read_bytes() for entry in folder.iterdir()}
    for entry, good in entries.items():
        entry.write_bytes(good[:40] + bytes([good[40] ^ 1]) + good[41:])
    _cache(tmp_path, monkeypatch)
    with pytest.warns(UserWarning, match="is damaged"):
        assert torch.equal(given.run(), expected)
    for entry in entries:
        assert hashlib.sha256(entry.read_bytes()[32:]).digest() == entry.read_bytes()[:32]


def test_folder_open_to_others_is_refused_with_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _cache(tmp_path, monkeypatch)
    folder.mkdir()
    folder.chmod(0o777)
    first, second = arguments(Case()), arguments(Case(size=(8, 8), channels=(32, 32)))
    with pytest.warns(UserWarning, match="not used"):
        check(first)
    check(second)  # a second warning would be an error
    assert not list(folder.iterdir())


def test_no_disk_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _cache(tmp_path, monkeypatch)
    folder.write_text("a file where the folder should be")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(arguments(Case()))


def test_operator_and_its_short_cut_agree() -> None:
    given = arguments(Case(residual=True))
    call = (*given.all, "cpu")
    expected = given.run()
    assert torch.equal(torch.ops.fxdbsr.conv(*call), expected)
    assert torch.equal(ops.conv(*call), expected)
    given.values.requires_grad_()
    (gradient,) = torch.autograd.grad(ops.conv(*call).sum(), given.values)
    assert gradient.shape == given.values.shape


def test_serial_without_an_openmp_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(Case())
    expected = given.run()
    monkeypatch.setattr(jit, "openmp", lambda: None)
    cpu_call.planned.cache_clear()
    assert torch.equal(given.run(), expected)
    cpu_call.planned.cache_clear()


@pytest.mark.parametrize("out", [(1, 1), (7, 7), (14, 14), (5, 31), (112, 112)])
@pytest.mark.parametrize("limits", [(3, 6), (6, 14), (12, 28)])
def test_tile_fits_registers_and_output(out: tuple[int, int], limits: tuple[int, int]) -> None:
    rows, columns = image_tile(out, limits, 3, (out[0], 1, 1, 1))
    assert 1 <= rows <= out[0]
    assert 1 <= columns <= out[1]
    assert rows * columns <= limits[1]


@pytest.mark.parametrize("registers", [2, 4])
@pytest.mark.parametrize("out", [(1, 1), (7, 7), (1, 49), (14, 14), (5, 31), (112, 112), (1, 12544)])
def test_register_tile_is_cut_into_equal_pieces(out: tuple[int, int], registers: int) -> None:
    rows, columns = register_tile(out, registers)
    pieces = ceil(columns / 16)
    assert columns % pieces == 0
    assert rows * pieces <= registers
    assert rows <= out[0]
    assert columns <= out[1]


TASK_CASES = [
    Case(size=(56, 56), channels=(64, 256)),
    Case(size=(7, 7), channels=(512, 2048)),
    Case(size=(14, 14), channels=(256, 256), kernel=(3, 3), padding=(1, 1)),
    Case(size=(112, 112), channels=(3, 64), kernel=(7, 7), padding=(3, 3), stride=(2, 2)),
    Case(size=(9, 5), channels=(40, 72), batch=3),
]


@pytest.mark.parametrize("kept", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("case", TASK_CASES, ids=lambda c: c.name)
def test_tasks_cover_each_output_and_are_enough_for_all_threads(case: Case, threads: int, kept: float) -> None:
    assert TARGET is not None
    conv = code(case, TARGET)
    rows, columns = geometry(case).grid.shape
    table = torch.tensor(task_table(conv, rows, int(kept * rows * columns), case.batch, threads)).view(-1, len(TASK))
    covered = torch.zeros(case.batch, *conv.out, rows, dtype=torch.int64)
    for image, top, bottom, left, right, first, last in table.tolist():
        covered[image, top:bottom, left:right, first:last] += 1
    assert (covered == 1).all()
    tiles = ceil(conv.out[0] / conv.tile[0]) * ceil(conv.out[1] / conv.tile[1]) * rows * case.batch
    assert len(table) >= min(tiles, threads)


def test_a_thread_that_is_held_up_leaves_its_tasks_to_others() -> None:
    """Every task is done once, also where one member of the team never takes any."""
    given = arguments(Case(size=(40, 40), channels=(64, 64), kernel=(3, 3), padding=(1, 1), batch=4))
    expected, threads = given.run(), torch.get_num_threads()
    try:
        torch.set_num_threads(16)  # more than the machine has: some start late
        assert all(torch.equal(given.run(), expected) for _ in range(50))
    finally:
        torch.set_num_threads(threads)
