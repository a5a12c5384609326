"""The kernels for convs of a few channels a group, against float64, and compiled for GPUs that are not there."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxdbsr.kernels import reference
from fxdbsr.kernels.geometry import ACTIVATIONS
from tests.triton_cases import DEVICE, GPU, imported, needs_interpreter

ONE = (1, 1)
LAST = torch.channels_last
EPS = torch.finfo(torch.float16).eps


@pytest.fixture(scope="module")
def engine() -> Iterator[ModuleType]:
    with imported():
        yield importlib.import_module("fxdbsr.kernels.triton_grouped")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Numbers that `dtype` holds exactly, in float64."""
    return torch.randn(shape, dtype=torch.float64).to(dtype).double()


@dataclass(frozen=True)
class Grouped:
    """A conv; every default is the plainest choice."""

    width: int = 4
    channels: int = 32
    kernel: tuple[int, int] = (3, 3)
    size: tuple[int, int] = (5, 7)
    stride: tuple[int, int] = ONE
    padding: tuple[int, int] = ONE
    dilation: tuple[int, int] = ONE
    bias: bool = True
    activation: str = "relu"
    batch: int = 2

    @property
    def groups(self) -> int:
        return self.channels // self.width

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return self.stride, self.padding, self.dilation

    def data(self, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Tensor | None]:
        x = random(self.batch, self.channels, *self.size, dtype=dtype)
        weight = random(self.channels, self.width, *self.kernel, dtype=dtype)
        return x, weight, random(self.channels, dtype=dtype) if self.bias else None

    def exact(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.activate(F.conv2d(x, weight, bias, *self.geometry, self.groups), self.activation)


def run(
    engine: ModuleType,
    case: Grouped,
    data: tuple[Tensor, Tensor, Tensor | None],
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """The case by the kernel, in `dtype`."""
    x, weight, bias = (None if t is None else t.to(DEVICE, dtype) for t in data)
    assert x is not None
    assert weight is not None
    assert engine.why_not(x, weight, None, *case.geometry, case.groups) is None
    laid = engine.spread(weight, case.groups)
    y: Tensor = engine.conv(x, laid, bias, *case.geometry, case.groups, case.activation, 0.01)
    return y


TILES = ((32, 1), (32, 4), (64, 1), (16, 2))  # pixels of a warp, warps


def take(monkeypatch: pytest.MonkeyPatch, engine: ModuleType, tile: tuple[int, int]) -> None:
    monkeypatch.setattr(engine, "ROWS", tile[0])
    monkeypatch.setattr(engine, "WARPS", tile[1])


CASES = {
    "groups of 4": Grouped(),
    "groups of 8": Grouped(width=8),
    "groups of 16": Grouped(width=16, channels=64),
    "96 channels, halved": Grouped(channels=96, stride=(2, 2), size=(7, 8)),
    "groups of 8, halved": Grouped(width=8, channels=64, stride=(2, 2), size=(6, 9)),
    "one axis of each": Grouped(width=16, stride=(1, 2), padding=(0, 2), size=(6, 5), kernel=(2, 5)),
    "dilation": Grouped(dilation=(2, 3), padding=(2, 3), size=(7, 8)),
    "7x7": Grouped(kernel=(7, 7), padding=(3, 3), size=(6, 5), batch=1),
    "1x1": Grouped(width=8, kernel=ONE, padding=(0, 0)),
    "more padding than the kernel needs": Grouped(padding=(3, 4), size=(3, 2)),
    "more pixels than a program": Grouped(size=(13, 11), batch=2, channels=64),
    "no bias, SiLU": Grouped(width=16, bias=False, activation="silu"),
}


@needs_interpreter
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_as_right_as_float16_can_be(monkeypatch: pytest.MonkeyPatch, engine: ModuleType, case: Grouped) -> None:
    data = case.data()
    exact = case.exact(*data)
    for tile in TILES:
        take(monkeypatch, engine, tile)
        y = run(engine, case, data)
        assert y.shape == exact.shape
        assert y.is_contiguous(memory_format=LAST)
        # summed in float32, rounded once
        assert (y.cpu() - exact).abs().max() <= EPS * exact.abs().max(), tile


@needs_interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_ends_with_every_activation(engine: ModuleType, activation: str) -> None:
    case = Grouped(size=(3, 4), activation=activation)
    data = case.data()
    exact = case.exact(*data)
    assert (run(engine, case, data).cpu() - exact).abs().max() <= EPS * exact.abs().max()


@pytest.mark.skipif(not GPU, reason="Triton's interpreter multiplies the bit patterns of bfloat16")
@pytest.mark.parametrize("width", [4, 8, 16])
def test_it_runs_bfloat16(engine: ModuleType, width: int) -> None:
    case = Grouped(width=width, channels=64)
    data = case.data(torch.bfloat16)
    exact = case.exact(*data)
    y = run(engine, case, data, dtype=torch.bfloat16)
    assert (y.cpu() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()


@needs_interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, infinity by zero
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("width", [4, 8, 16])
def test_a_number_that_is_not_finite_stays_in_its_group(engine: ModuleType, width: int, value: float) -> None:
    case = Grouped(width=width, channels=64, activation="none")
    x, weight, bias = case.data()
    weight = weight.where(weight != 0, torch.ones_like(weight))
    x[0, 21, 2, 3] = value
    x[1, 2, 0, 0] = value
    exact = case.exact(x, weight, bias)
    assert not exact.isfinite().all()
    y = run(engine, case, (x, weight, bias)).cpu().double()
    torch.testing.assert_close(y, exact, rtol=1e-3, atol=1e-2, equal_nan=True)


@needs_interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, infinity by zero
@pytest.mark.parametrize("width", [4, 8, 16])
def test_a_weight_that_is_not_finite_makes_its_own_outputs_so(engine: ModuleType, width: int) -> None:
    case = Grouped(width=width, activation="none")
    x, weight, bias = case.data()
    exact = case.exact(x, weight, bias)
    weight[7, 1, 1, 1] = torch.inf
    others = [o for o in range(case.channels) if o != 7]
    y = run(engine, case, (x, weight, bias)).cpu().double()
    assert not y[:, 7].isfinite().any()
    torch.testing.assert_close(y[:, others], exact[:, others], rtol=1e-3, atol=1e-2)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no batch": ({"x": (32, 8, 8)}, "it runs 2-d convs of batches"),
    "3-d": ({"weight": (32, 4, 3, 3, 3)}, "it runs 2-d convs"),
    "float32": ({"dtype": torch.float32}, "it runs float16 and bfloat16, not float32"),
    "two dtypes": ({"weight_dtype": torch.bfloat16}, "in the dtype of the weight"),
    "groups of 2": ({"weight": (32, 2, 3, 3), "groups": 16}, "groups of 4, 8 or 16"),
    "groups of 32": ({"weight": (32, 32, 3, 3), "groups": 1}, "groups of 4, 8 or 16"),
    "more outputs than inputs": ({"weight": (64, 4, 3, 3)}, "as many in as out"),
    "48 channels": ({"x": (2, 48, 8, 8), "weight": (48, 4, 3, 3), "groups": 12}, "multiples of 32"),
    "tall kernel": ({"weight": (32, 4, 8, 1)}, "up to 7 taps an axis"),
    "residual": ({"residual": True}, "it adds no residual"),
    "other channels": ({"x": (2, 64, 8, 8)}, "torch says what is wrong with it"),
    "small image": ({"x": (2, 32, 8, 2), "padding": (0, 0)}, "torch says what is wrong with it"),
    "large input": ({"x": (2**12, 32, 2**7, 2**7), "device": "meta"}, "fewer than 2**31"),
    "large output": ({"x": (2**12, 32, 2**6, 2**6), "padding": (99, 99), "device": "meta"}, "fewer than 2**31"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_it_is_not_made_for_is_a_sentence(engine: ModuleType, change: dict[str, Any], reason: str) -> None:
    dtype = change.get("dtype", torch.float16)
    x = torch.zeros(change.get("x", (2, 32, 8, 8)), dtype=dtype, device=change.get("device"))
    weight = torch.zeros(change.get("weight", (32, 4, 3, 3)), dtype=change.get("weight_dtype", dtype))
    residual = torch.zeros(2, 32, 8, 8, dtype=dtype) if change.get("residual") else None
    found = engine.why_not(x, weight, residual, ONE, change.get("padding", ONE), ONE, change.get("groups", 8))
    assert reason in str(found)
