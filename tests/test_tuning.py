"""Choosing engines by measurement: numbers are checked before they are timed, and what was found is kept."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxdbsr
from bench.coverage import BOUND
from fxdbsr.kernels import cache, tuning
from fxdbsr.kernels.choice import Choice, engine_module
from fxdbsr.kernels.ops import engine_conv
from fxdbsr.layers import blocked_layers
from fxdbsr.nn import fastest, packed_forward
from fxdbsr.nn.packed import PackedConv

X = torch.randn(2, 8, 10, 10)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FXDBSR_CACHE", str(tmp_path / "cache"))
    cache._said.clear()
    yield tmp_path / "cache"
    cache._said.clear()


def model(keep: int = 2) -> nn.Module:
    """One conv of 4 x 2 blocks of 4, `keep` of the four rows on."""
    torch.manual_seed(0)
    prepared = fxdbsr.prepare(nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Sigmoid()), 4)
    mask = torch.zeros(4, 2, dtype=torch.bool)
    mask[:keep] = True
    blocked_layers(prepared)[0].set_mask(mask)
    return prepared.eval()


def tuned(prepared: nn.Module) -> PackedConv:
    """The packed conv of `prepared`, tuned and held to be right."""
    found = fxdbsr.convert(prepared, tune=True, example_inputs=X)
    with torch.no_grad():
        torch.testing.assert_close(found(X), prepared(X), rtol=BOUND, atol=BOUND)
    (layer,) = (m for m in found.modules() if isinstance(m, PackedConv))
    return layer


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("tuning-*.json"))


def say_times(monkeypatch: pytest.MonkeyPatch, times: Callable[[str], float]) -> list[list[str]]:
    """Let `times` stand for the clock; returns the candidates of each layer that is timed."""
    timed: list[list[str]] = []

    def milliseconds(calls: dict[str, Any], device: torch.device) -> dict[str, float]:
        timed.append(sorted(calls))
        return {name: times(name) for name in calls}

    monkeypatch.setattr(fastest, "milliseconds", milliseconds)
    return timed


@pytest.mark.parametrize("best", ["cpu", "dense", "compact"])
def test_the_fastest_candidate_is_taken_and_the_reason_names_all_times(
    folder: Path, monkeypatch: pytest.MonkeyPatch, best: str
) -> None:
    timed = say_times(monkeypatch, lambda name: 1.0 if name == best else 2.0)
    layer = tuned(model())
    assert timed == [["compact", "cpu", "dense"]]
    assert layer.engine == best
    assert layer.reason.startswith(f"measured: {best} 1.000 ms, ")
    assert not layer._forward_pre_hooks


def test_what_was_measured_is_plain_json_and_not_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = say_times(monkeypatch, lambda name: 1.0 if name == "dense" else 2.0)
    tuned(model())
    again = tuned(model())
    assert len(timed) == 1
    assert (again.engine, again.reason.split(",")[0]) == ("dense", "measured before: dense 1.000 ms")
    (path,) = files(folder)
    entry = json.loads(path.read_text())
    assert entry["milliseconds"] == {"compact": 2.0, "cpu": 2.0, "dense": 1.0}
    assert entry["key"]["versions"]["torch"] == torch.__version__


def test_another_density_is_measured_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = say_times(monkeypatch, lambda _: 1.0)
    tuned(model(2))
    tuned(model(3))
    assert len(timed) == len(files(folder)) == 2


def test_layers_that_are_the_same_conv_once_lifted_are_measured_apart(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = say_times(monkeypatch, lambda _: 1.0)
    flat = fxdbsr.prepare(nn.Sequential(nn.Conv1d(8, 16, 3, padding=1)), 4)
    planar = fxdbsr.prepare(nn.Sequential(nn.Conv2d(8, 16, (1, 3), padding=(0, 1))), 4)
    fxdbsr.convert(flat, tune=True, example_inputs=X[:, :, 0])
    fxdbsr.convert(planar, tune=True, example_inputs=X[:, :, :1])
    assert len(timed) == len(files(folder)) == 2


def test_the_key_holds_device_versions_geometry_dtype_and_density() -> None:
    layer = next(m for m in fxdbsr.convert(model(), example_inputs=X).modules() if isinstance(m, PackedConv))
    case = layer.case()
    keys = [
        tuning.key_of(other, threads)
        for other, threads in (
            (case, 1),
            (case, 2),
            (replace(case, stride=(2, 2)), 1),
            (replace(case, size=(4, 10, 10)), 1),
            (replace(case, dtype=torch.float64), 1),
            (replace(case, activation="relu"), 1),
            (replace(case, residual=True), 1),
            (replace(case, col_indices=case.col_indices[1:]), 1),
            (replace(case, grid=replace(case.grid, block_size=(8, 4))), 1),
        )
    ]
    assert len({tuning.file_of(key) for key in keys}) == len(keys)
    assert json.loads(json.dumps(keys)) == keys


DAMAGE: dict[str, Callable[[Any], str]] = {
    "empty": lambda entry: "",
    "cut": lambda entry: json.dumps(entry)[:-9],
    "bytes": lambda entry: "\x00\xff",
    "list": lambda entry: "[]",
    "deep": lambda entry: "[" * 100_000,
    "another conv": lambda entry: json.dumps(entry | {"key": {}}),
    "no times": lambda entry: json.dumps(entry | {"milliseconds": {}}),
    "words": lambda entry: json.dumps(entry | {"milliseconds": {"cpu": "fast"}}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_measured_again_and_one_warning_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    timed = say_times(monkeypatch, lambda _: 1.0)
    tuned(model())
    (path,) = files(folder)
    good = path.read_text()
    path.write_text(DAMAGE[damage](json.loads(good)))
    with pytest.warns(UserWarning, match=r"tuning-.*json is damaged"):
        tuned(model())
    assert len(timed) == 2
    assert path.read_text() == good


@pytest.mark.parametrize("name", ["triton", "cpu; rm", "reference", "auto"])
def test_a_file_that_names_no_candidate_is_measured_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    timed = say_times(monkeypatch, lambda _: 1.0)
    tuned(model())
    (path,) = files(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"milliseconds": {name: 0.1}}))
    assert tuned(model()).engine != name
    assert len(timed) == 2


@pytest.fixture
def broken_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own conv gives wrong numbers in packed layers."""
    right = packed_forward._by_torch
    monkeypatch.setattr(packed_forward, "_by_torch", lambda *call: right(*call) + 1e-2)


@pytest.mark.usefixtures("broken_dense")
def test_a_candidate_with_wrong_numbers_is_not_timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = say_times(monkeypatch, lambda _: 1.0)
    assert tuned(model()).engine == "cpu"
    assert timed == [["cpu"]]


def test_a_triton_kernel_that_cannot_run_is_not_timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        """Stands in for the Triton engine on a GPU that has too little shared memory."""

        layout = staticmethod(lambda values: values)
        tables = staticmethod(lambda *_, **__: [])

        @staticmethod
        def conv(*_: Any) -> Tensor:
            raise RuntimeError("out of resource: shared memory")

    choices = {"triton gather": Choice("triton", ""), "dense": Choice("dense", "")}
    monkeypatch.setattr(fastest, "candidates", lambda case: choices)
    module, conv = engine_module, engine_conv
    monkeypatch.setattr("fxdbsr.nn.packed.engine_module", lambda name: Engine if name == "triton" else module(name))
    monkeypatch.setattr("fxdbsr.kernels.ops.engine_conv", lambda name: Engine.conv if name == "triton" else conv(name))
    timed = say_times(monkeypatch, lambda _: 1.0)
    assert tuned(model()).engine == "dense"
    assert timed == [["dense"]]


def test_what_was_measured_before_is_checked_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    timed = say_times(monkeypatch, lambda name: 1.0 if name == "dense" else 2.0)
    assert tuned(model()).engine == "dense"
    request.getfixturevalue("broken_dense")
    assert tuned(model()).engine == "cpu"
    assert timed[1:] == [["cpu"]]


def test_without_a_folder_it_is_measured_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_folder", lambda: None)
    timed = say_times(monkeypatch, lambda _: 1.0)
    tuned(model())
    tuned(model())
    assert len(timed) == 2


def test_measured_times_choose(folder: Path) -> None:
    layer = tuned(model())
    (path,) = files(folder)
    times = json.loads(path.read_text())["milliseconds"]
    assert layer.engine == min(times, key=times.get)
    assert all(0 < time < 1e3 for time in times.values())


def test_with_example_inputs_alone_the_rule_knows_the_sizes() -> None:
    def reason(**kwargs: Any) -> str:
        found = fxdbsr.convert(model(), **kwargs)
        return next(m.reason for m in found.modules() if isinstance(m, PackedConv))

    assert "at 1x28x28, as the size is not known" in reason()
    assert "at 2x10x10 (" in reason(example_inputs=X)


def test_the_choice_follows_shape_and_density() -> None:
    def engine(conv: nn.Module, x: Tensor, block: Any, rows_on: int) -> str:
        prepared = fxdbsr.prepare(conv, block).eval()
        layer = blocked_layers(prepared)[0]
        mask = torch.zeros_like(layer.mask)
        mask[:rows_on] = True
        layer.set_mask(mask)
        found = fxdbsr.convert(prepared, example_inputs=x)
        return next(m.engine for m in found.modules() if isinstance(m, PackedConv))

    x = torch.randn(1, 64, 28, 28)
    assert engine(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Sigmoid()), x, 32, 1) == "cpu"
    low = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Sigmoid())
    assert engine(low, x, (1, None), 64) == "dense", "blocks of one row leave most of a vector empty"
