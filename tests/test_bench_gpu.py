"""bench/gpu.py and its companions where there is no GPU: exit codes, resuming, what they claim, that they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

import fxdbsr
from bench import (
    gpu,
    gpu_ahead,
    gpu_compiled,
    gpu_convs,
    gpu_first,
    gpu_hand,
    gpu_layers,
    gpu_models,
    gpu_plan,
    gpu_setting,
    gpu_tools,
    inspect_kernels,
)
from bench.gpu_compiled import deadline
from bench.gpu_convs import Conv
from bench.gpu_hazards import CONVS
from bench.gpu_networks import Exact, pruned, sparse_arms
from bench.gpu_setting import Case, Records, Setting, set_precision
from fxdbsr.kernels.triton_plan import precision_of
from fxdbsr.kernels.triton_tune import candidates
from fxdbsr.layers import blocked_layers
from fxdbsr.nn.packed import PackedConv
from tests.triton_cases import float32_precision, needs_interpreter

ROOT = Path(__file__).parents[1]
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(autouse=True)
def two_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two convs stand for every network; switches that the bench sets are put back."""
    listed = {CONVS["1x1"]: 2, CONVS["3x3"]: 1}
    for module in (gpu_convs, gpu_plan, gpu_layers, gpu_models, gpu_ahead):
        monkeypatch.setattr(module, "convs", lambda model: listed)
    with float32_precision("tf32"):
        yield


@needs_no_gpu
def test_without_a_gpu_it_exits_2_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "gpu.jsonl")]) == 2
    assert gpu_first.main(["--out", str(tmp_path / "gpu.jsonl")]) == 2
    assert capsys.readouterr().err.count("no GPU here") == 2


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_offline_claims_no_measurement_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.jsonl"
    arguments = ["--offline", "--part", "layers", "models", "--model", "vgg11", "--dtype", "fp16", "--out", str(out)]
    assert gpu.main(arguments) == 0
    found = records(out)
    assert len(found) == 2 * 2 * 3 + 2 * 3  # convs, blocks, sparsities; networks
    assert not any(record["measured"] for record in found)
    assert all(record["reason"] and "ceiling" in record for record in found if record["key"]["part"] == "layers")
    assert "ceiling" in capsys.readouterr().out
    assert gpu.main(arguments) == 0
    assert capsys.readouterr().out == ""


def test_every_layer_is_printed_with_ceiling_choice_and_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.jsonl"
    gpu_plan.main(["--model", "resnet50", "--dtype", "fp16", "--block", "128x32", "--json", str(path)])
    head, *rows = records(path)
    assert head["measured"] is False
    assert [row["count"] for row in rows] == [2, 1]
    assert all(row[f"{s} %"]["reason"] for row in rows for s in (50, 70, 90))
    assert capsys.readouterr().out.count("ceiling") == 6


REHEARSAL = """
import sys
import fxdbsr
from bench import gpu, gpu_convs, gpu_layers, gpu_models
from bench.gpu_hazards import CONVS
listed = {CONVS["1x1"]: 1}
gpu_convs.convs = gpu_layers.convs = gpu_models.convs = lambda model: listed
sys.exit(gpu.main(sys.argv[1:]))
"""


@needs_no_gpu
@needs_interpreter
def test_the_measuring_code_of_every_part_runs(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    parts = [part for part in gpu.PARTS if part != "sanitizer"]  # which starts a process of its own
    command = [sys.executable, "-c", REHEARSAL, "--offline", "--rehearse", "--limit", "2", "--repeats", "1"]
    command += ["--out", str(out), "--part", *parts, "--sparsity", "50"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = records(out)
    assert {record["key"]["part"] for record in found} == set(parts)
    assert not any(record["measured"] or "wrong" in record or "failed" in record for record in found)


@dataclass
class Fake:
    """A part with one case, whose measurement does as it is told."""

    error: Exception | None = None
    found: dict[str, Any] = field(default_factory=dict)

    def cases(self, options: Any) -> Iterator[Case]:
        def measure(setting: Setting) -> dict[str, Any]:
            if self.error:
                raise self.error
            return self.found

        yield Case({"part": "ceilings"}, dict, measure)


def run_fake(monkeypatch: pytest.MonkeyPatch, path: Path, fake: Fake, lost: bool = False) -> int:
    """`bench.gpu` with `fake` for a part, as if there were a GPU."""

    def synchronize() -> None:
        if lost:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu, "import_module", lambda name: fake)
    monkeypatch.setattr(gpu, "give_inductor_tritons_assembler", lambda: None)
    return gpu.main(["--part", "ceilings", "--out", str(path)])


def test_wrong_numbers_exit_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    assert run_fake(monkeypatch, path, Fake(found={"wrong": "error 1"})) == 1
    assert records(path)[0]["measured"]


def test_a_case_that_fails_is_recorded_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    assert run_fake(monkeypatch, path, Fake(RuntimeError("out of memory"))) == 0
    assert records(path)[0]["failed"] == "RuntimeError: out of memory"


def test_nothing_is_compiled_ahead_where_all_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled: list[int] = []
    monkeypatch.setattr(gpu, "compile_kernels", lambda _: compiled.append(1))
    for _ in range(2):
        assert run_fake(monkeypatch, tmp_path / "gpu.jsonl", Fake()) == 0
    assert compiled == [1]


def test_a_lost_gpu_exits_3_and_the_case_is_skipped_next_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    assert run_fake(monkeypatch, path, Fake(RuntimeError("launch failed")), lost=True) == 3
    assert "illegal memory access" in records(path)[0]["interrupted"]
    assert run_fake(monkeypatch, path, Fake(RuntimeError("launch failed")), lost=True) == 0
    assert len(records(path)) == 1


def test_estimates_do_not_count_as_measured(tmp_path: Path) -> None:
    case = Case({"part": "x"}, dict, None)
    Records(tmp_path / "r.jsonl", measured=False).add(case, {})
    assert Records(tmp_path / "r.jsonl", measured=False).has(case)
    assert not Records(tmp_path / "r.jsonl", measured=True).has(case)


def test_networks_are_planned_for_the_size_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = fxdbsr.convert
    monkeypatch.setattr(fxdbsr, "convert", lambda source, backend: convert(source, backend="dense"))
    arms = sparse_arms(pruned("tiny", (32, 32), 0.5), torch.zeros(5, 3, 8, 8), "fp16")
    for arm in arms.values():
        sizes = [layer.input_size for layer in arm.modules() if isinstance(layer, PackedConv)]
        assert sizes == [(5, 8, 8), (5, 6, 6)]


def test_a_deadline_interrupts() -> None:
    with pytest.raises(TimeoutError, match="over 0 s"), deadline(0.01):
        time.sleep(10)


def test_the_first_half_hour_lists_and_sums_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_first.main(["--list"]) == 0
    assert "headline" in capsys.readouterr().out
    key = {"part": "models", "model": "resnet50", "dtype": "fp16", "batch": 32, "block": "128x32", "sparsity": 50}
    measured = {"key": key, "measured": True, "sparse over compiled": [1.4, 1.45, 1.5]}
    text = gpu_first.summary([measured, {"key": {"part": "x"}, "measured": True, "wrong": "error 1"}])
    assert "2 of 2 records measured, 1 wrong or failed" in text
    assert "resnet50 fp16 b32 128x32 sparse: 1.45 (of 1.5)" in text


def test_the_first_half_hour_calls_every_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def note(arguments: list[str]) -> int:
        calls.append(arguments)
        return 0

    monkeypatch.setattr(gpu, "main", note)
    assert gpu_first.main(["--offline", "--out", str(tmp_path / "gpu.jsonl")]) == 0
    parsed = [gpu.parse(arguments) for arguments in calls]
    assert {part for options in parsed for part in options.part} == set(gpu.PARTS)
    assert all(options.rehearse for options in parsed)


AHEAD = """
from bench.gpu_ahead import compile_conv, only_compile
from bench.gpu_ahead_network import compile_network
from bench.gpu_hazards import CONVS
only_compile(90)
print(compile_conv("layers", CONVS["1x1"], "fp16", 2, "32x32", 50))
print(compile_network("tiny", "fp32", 2, "32x32", 50, "exact"))
"""


@needs_no_gpu
def test_a_forward_reads_nothing_back_from_tensors_without_data(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", AHEAD]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.stdout == "None\nNone\n", done.stdout + done.stderr
    assert list(tmp_path.rglob("gather_kernel.cubin"))


def partitioned(jobs: list[Any], function: Any) -> tuple[list[Any], list[Any]]:
    """The arguments of the jobs that call `function`, and those of the rest."""
    return [job.args for job in jobs if job.func is function], [job.args for job in jobs if job.func is not function]


def test_every_form_that_is_repeated_or_worked_by_hand_is_compiled_ahead() -> None:
    options = gpu.parse(["--part", "hand", "hazards", "--dtype", "bf16", "fp32"])
    rows, repeats = partitioned(gpu_ahead.jobs(options), gpu_ahead.compile_hand)
    assert rows == [(row,) for row in (*gpu_hand.HAND, *gpu_hand.MORE)]
    assert repeats == [(name, dtype) for name in CONVS for dtype in ("bf16", "fp32")]


def test_what_is_compiled_ahead_is_what_the_cases_run() -> None:
    asked = ["--part", "correctness", "models", "--dtype", "fp32", "--block", "32x32", "--sparsity", "50", "90"]
    options = gpu.parse([*asked, "--model", "resnet50", "--batch", "32"])
    of_convs, of_networks = partitioned(gpu_ahead.jobs(options), gpu_ahead.compile_conv)
    found = [(part, conv.name, batch, sparsity) for part, conv, _, batch, _, sparsity in of_convs]
    assert found == [("correctness", CONVS[name].name, 2, sparsity) for name in ("1x1", "3x3") for sparsity in (50, 90)]
    keys = [case.key for case in gpu_models.cases(options)]
    assert of_networks == [
        tuple(key[name] for name in ("model", "dtype", "batch", "block", "sparsity", "masks")) for key in keys
    ]
    set_precision("fp32")
    layer = CONVS["3x3"].layer(2, torch.float32, (32, 32), 0.5)
    names = [*gpu_ahead.kernels_of("correctness", layer)]
    assert sorted(names) == sorted(candidates(replace(layer, allow_3xtf32=True), torch.device("cpu"), 0))
    assert any("3xTF32" in name for name in names)
    assert [*gpu_ahead.kernels_of("layers", layer)] == ["chosen", "3xTF32"]
    set_precision("fp16")
    layer = CONVS["3x3"].layer(2, torch.float16, (32, 32), 0.5)
    assert [*gpu_ahead.kernels_of("layers", layer)] == ["chosen"]
    assert gpu_ahead.kernels_of("candidates", layer) == candidates(layer, torch.device("cpu"), gpu_layers.FORMS)


def test_a_compiler_that_crashes_ahead_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ProcessPoolExecutor):
        def map(self, *_: Any, **__: Any) -> Any:
            raise BrokenProcessPool("a child process terminated abruptly")

    monkeypatch.setattr(gpu_ahead, "ProcessPoolExecutor", Broken)
    [found] = gpu_ahead.compile_ahead([lambda: None], 90, 1)
    assert "terminated abruptly" in found


@pytest.mark.parametrize("dtype", ["fp16", "tf32", "fp32"])
def test_every_switch_of_float32_can_be_read_and_says_the_same(dtype: str) -> None:
    set_precision(dtype)
    allowed = dtype == "tf32"
    assert torch.backends.cudnn.allow_tf32 is allowed
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")  # max-autotune reads it
    assert precision_of(torch.float32) == ("tf32" if allowed else "ieee")


def test_records_need_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Records(tmp_path / "r.jsonl", measured=False).where["commit"] == ""


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Records(path, measured=False).add(Case({"part": "x"}, dict, None), {})
    path.write_text(path.read_text() + '{"key": {"pa')
    again = Records(path, measured=False)
    again.add(Case({"part": "y"}, dict, None), {})
    assert [r["key"]["part"] for r in Records(path, measured=False).all] == ["x", "y"]


def test_a_deadline_that_is_caught_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_compiled, "AGAIN_SECONDS", 0.01)

    def swallows() -> None:
        with deadline(0.01):
            with suppress(TimeoutError):
                time.sleep(10)
            time.sleep(10)

    with pytest.raises(TimeoutError):
        swallows()


def test_no_time_left_is_no_endless_deadline() -> None:
    with pytest.raises(TimeoutError, match="no time"), deadline(0):
        time.sleep(10)


class Compiler:
    """Stands in for torch.compile: modes that fail, and what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *failing: str | None) -> None:
        self.failing, self.asked = failing, list[str | None]()
        monkeypatch.setattr(torch, "compile", self)

    def __call__(self, net: Any, dynamic: bool, mode: str | None) -> Any:
        self.asked.append(mode)
        if mode in self.failing:
            raise RuntimeError("no such conv")
        return net


AUTOTUNE = "max-autotune-no-cudagraphs"


def dense_arms(monkeypatch: pytest.MonkeyPatch, stop: float) -> tuple[set[str], dict[str, str]]:
    monkeypatch.setattr(Setting, "device", torch.device("cpu"))
    monkeypatch.setattr(gpu_compiled, "images", lambda *_: torch.zeros(2, 3, 8, 8))
    gpu_compiled.dense_arms.cache_clear()
    arms, how = gpu_compiled.dense_arms("tiny", "fp32", 2, Setting(stop=time.monotonic() + stop))
    return {*arms}, how


def test_with_time_both_networks_are_compiled_by_max_autotune(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(monkeypatch)
    assert dense_arms(monkeypatch, 400) == (
        {"eager", "compiled", "default mode", "folded"},
        {"compiled": "max-autotune", "folded": "max-autotune"},
    )
    assert compiler.asked == [AUTOTUNE, None, AUTOTUNE]


def test_where_time_is_short_the_baseline_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(monkeypatch)
    arms, how = dense_arms(monkeypatch, 60)
    assert arms == {"eager", "compiled"}
    assert how["compiled"].startswith("default mode: max-autotune ended in TimeoutError")
    assert "too little time" in how["folded"]
    assert compiler.asked == [None]


def test_a_network_that_cannot_be_compiled_keeps_its_other_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    Compiler(monkeypatch, AUTOTUNE, None)
    arms, how = dense_arms(monkeypatch, 400)
    assert arms == {"eager"}
    assert how["compiled"].startswith("not compiled")
    assert how["compiled"].count("no such conv") == 2


def test_a_second_network_that_cannot_be_compiled_leaves_the_first_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def compile(net: Any, dynamic: bool, mode: str | None) -> Any:
        if made:
            raise TimeoutError("over 100 s")
        made.append("compiled")
        return net

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: made.clear())
    arms, how = dense_arms(monkeypatch, 400)
    assert arms == {"eager", "compiled"}
    assert how["folded"].startswith("not compiled")
    assert made == ["compiled"]


def test_every_conv_is_compiled_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_convs.Problem, "sparse", lambda problem, **_: problem.eager)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for size in (3, 4, 5):
            layer = replace(CONVS["1x1"].small(), size=(size, size)).layer(1, torch.float32, (32, 32), 0.5)
            assert "us compiled" in gpu_layers.measure("compile", layer, Setting(rehearse=True, repeats=1))


def test_inductor_is_given_tritons_assembler_unless_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", "mine")
    gpu_compiled.give_inductor_tritons_assembler()
    assert os.environ["TRITON_PTXAS_PATH"] == "mine"
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    gpu_compiled.give_inductor_tritons_assembler()
    path = Path(os.environ["TRITON_PTXAS_PATH"])
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    assert path.is_file()
    assert "triton" in path.parts


def test_the_sanitizer_sees_every_tensor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        assert command[0] == "compute-sanitizer"
        assert env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        return SimpleNamespace(stdout="========= ERROR SUMMARY: 0 errors", stderr="", returncode=0)

    monkeypatch.setattr(gpu_tools, "_tool", lambda name: name)
    monkeypatch.setattr(subprocess, "run", run)
    for form in ("gather", gpu_tools.NETWORK):
        assert gpu_tools.sanitized("memcheck", form, "3x3", Setting()) == {"summary": "0 errors"}


def test_what_the_sanitizer_ran_must_end_well(monkeypatch: pytest.MonkeyPatch) -> None:
    done = SimpleNamespace(stdout="========= ERROR SUMMARY: 0 errors", stderr="ValueError: off", returncode=1)
    monkeypatch.setattr(gpu_tools, "_tool", lambda name: name)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert "wrong" in gpu_tools.sanitized("memcheck", gpu_tools.NETWORK, "3x3", Setting())


def test_the_network_for_the_sanitizer_keeps_its_channels_and_half_of_its_blocks() -> None:
    prepared = gpu_tools.half_off(fxdbsr.prepare(gpu_tools.small_network(), config=fxdbsr.BlockConfig((32, 32))))
    x = torch.randn(2, 3, 37, 42)
    fast = fxdbsr.convert(prepared, backend="reference")
    torch.testing.assert_close(fast(x), prepared(x), rtol=1e-4, atol=1e-5)
    packed = [layer for layer in fast.modules() if isinstance(layer, PackedConv)]
    assert [layer.grid.out_channels for layer in packed] == [64, 128, 128, 128, 128, 128, 64]
    assert [layer.density for layer in packed if layer.grid.groups == 1] == [1, 0.5, 0.5, 0.5]


def test_what_cannot_be_captured_is_left_out_of_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(function: Callable[[], float], calls: int) -> float:
        return function()

    def fails() -> float:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(gpu_setting, "captured", captured)
    monkeypatch.setattr(gpu_setting, "replayed_in_turns", lambda graphs, *_: {n: [g] * 5 for n, g in graphs.items()})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = Setting().times({"compiled": fails, "eager": lambda: 3.0, "sparse": lambda: 2.0}, "compiled")
    assert "stream is capturing" in found["no compiled"]
    assert found["sparse over eager"] == [1.5, 1.5, 1.5]
    assert "no compiled" in gpu.line({"key": {"part": "models"}, **found})
    with pytest.raises(RuntimeError, match="nothing could be timed"):
        Setting().times({"compiled": fails}, "compiled")


def test_every_image_of_the_batch_that_is_timed_is_checked() -> None:
    prepared, x = pruned("tiny", (32, 32), 0.5), torch.randn(5, 3, 8, 8)

    def off(images: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = prepared(images)
        return outputs + (torch.arange(len(images)) == 4)[:, None, None, None]

    def fails(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of resource")

    with torch.no_grad():
        exact = Exact.of(prepared, x)
        assert exact.why_wrong(prepared, x) is None
        assert "against float64" in str(exact.why_wrong(off, x))
        assert exact.why_wrong(fails, x) == "RuntimeError: out of resource"


def test_an_arm_that_is_wrong_keeps_the_others_in_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = {"sparse": pruned("tiny", (32, 32), 0.5), "dense": pruned("tiny", (32, 32), 0.5)}
    [*arms["sparse"].parameters()][-1].data += 1  # of this arm alone
    monkeypatch.setattr(gpu_models, "sparse_arms", lambda *_: arms)
    found = gpu_models.measure("tiny", "fp32", 2, (32, 32), 0.5, "covered", Setting(rehearse=True))
    assert found["wrong"].startswith("sparse: error ")
    assert {"us compiled", "us dense"} < set(found)
    assert "us sparse" not in found
    timed = gpu.line({"key": {"part": "models"}, **found, "dense over compiled": [1.0, 1.25, 1.5]})
    assert "WRONG: sparse" in timed
    assert "dense over compiled 1.25x" in timed


def small_problem() -> gpu_convs.Problem:
    layer = CONVS["1x1"].small().layer(2, torch.float32, (32, 32), 0.5)
    return gpu_convs.Problem.of(layer, torch.device("cpu"), 1)


def test_a_form_that_cannot_run_is_wrong_and_the_others_are_tried() -> None:
    def run(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        raise OutOfResources(300_000, 232_448, "shared memory")

    assert "OutOfResources: out of resource: shared memory" in str(small_problem().why_wrong(run, 1))


def test_a_form_that_loses_the_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    problem = small_problem()
    problem.weight = SimpleNamespace(is_cuda=True)  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        problem.why_wrong(fail, 1)


def test_counters_that_the_gpu_does_not_have_are_left_out() -> None:
    name, other = [*gpu_tools.COUNTERS][:2]
    rows = [("0", name, "7"), ("1", name, "1,234.5"), ("1", other, "n/a")]
    text = "==PROF==\n" + "".join(f'"{a}","{b}","{c}"\n' for a, b, c in [("ID", "Metric Name", "Metric Value"), *rows])
    assert gpu_tools._counters(text) == {gpu_tools.COUNTERS[name]: 1234.5}
    assert gpu_tools._counters("==ERROR== no such metric") == {}


def first(monkeypatch: pytest.MonkeyPatch, path: Path, main: Any, *arguments: str) -> int:
    """`bench.gpu_first` as if there were a GPU, with `main` for that of bench.gpu."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(gpu, "main", main)
    return gpu_first.main(["--out", str(path), *arguments])


def test_a_step_that_fails_leaves_the_others_their_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []

    def main(arguments: list[str]) -> int:
        calls.append(arguments[1])
        if len(calls) == 1:
            raise ValueError("of what stands around the cases")
        return 0

    assert first(monkeypatch, tmp_path / "gpu.jsonl", main) == 1
    assert len(calls) == len(gpu_first.STEPS)


def test_steps_that_need_less_time_than_others_still_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def main(arguments: list[str]) -> int:
        calls.append(arguments)
        return 0

    assert first(monkeypatch, tmp_path / "gpu.jsonl", main, "--seconds", "150") == 0
    parts = [arguments[1] for arguments in calls]
    assert "ceilings" in parts
    assert "models" not in parts
    assert all(gpu.parse(arguments).within <= 150 for arguments in calls)


def test_what_failed_elsewhere_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before, path = tmp_path / "before.jsonl", tmp_path / "gpu.jsonl"
    lost = {"failed": "x", "interrupted": ""}
    found: dict[str, dict[str, Any]] = {"right": {}, "failed": {"failed": "x"}, "lost": lost}
    lines = [{"key": {"part": part}, "measured": True, "device": "a GPU", **rest} for part, rest in found.items()]
    before.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first(monkeypatch, path, lambda _: 0, "--from", str(before))
    assert [record["key"]["part"] for record in records(path)] == ["right", "lost"]


def test_convs_have_names_that_tell_them_apart() -> None:
    names = {conv.name for conv in CONVS.values()}
    assert len(names) == len(CONVS)
    assert Conv(64, 64, (3, 3), (2, 2), (1, 1), 32, (56, 56), False, "relu").name == "64->64 3x3 at 56 /2 g32 relu"


def test_inspect_prints_facts_of_every_tile(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--target", "hip:gfx942", "--geometry", "1x1", "--precision", "ieee", "--json"]
    assert inspect_kernels.main(arguments) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {record["precision"] for record in found} == {"ieee"}
    assert all(record["spills"] == 0 and record["faults"] == [] for record in found)


def test_exact_masks_keep_the_share_that_is_asked_for_and_covered_ones_every_row_and_column() -> None:
    exact, covered = (pruned("resnet50", (128, 32), 0.9, masks) for masks in ("exact", "covered"))
    assert all(bool(next(iter(blocked_layers(model))).mask.all()) for model in (exact, covered))
    large = [layer.mask.float().mean() for layer in blocked_layers(exact) if layer.mask.numel() >= 64]
    assert all(abs(float(density) - 0.1) < 0.01 for density in large)
    assert all(bool(layer.mask.any(0).all() and layer.mask.any(1).all()) for layer in blocked_layers(covered))


def test_of_a_cache_only_what_a_launch_reads_is_kept(tmp_path: Path) -> None:
    (tmp_path / "hash").mkdir()
    for suffix in ("cubin", "json", "ptx", "ttgir"):
        (tmp_path / "hash" / f"kernel.{suffix}").touch()
    assert gpu_ahead.keep_what_a_launch_reads(tmp_path) == 1
    assert sorted(path.suffix for path in tmp_path.glob("*/*")) == [".cubin", ".json"]
