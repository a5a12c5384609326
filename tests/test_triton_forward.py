"""What a forward on the Triton engine does beside its kernels, and what a compiler is told of it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxdbsr.blocks import BlockGrid
from fxdbsr.nn.packed import PackedConv
from tests.triton_cases import DEVICE, Case, build, float32_precision, imported, needs_interpreter

pytestmark = needs_interpreter


@pytest.fixture(scope="module")
def engine() -> Iterator[ModuleType]:
    with imported() as module:
        yield module


@pytest.mark.parametrize("kernel", [(3, 3), (3,)], ids=["2-d", "1-d, lifted"])
def test_values_that_learn_are_the_values_that_are_used(engine: ModuleType, kernel: tuple[int, ...]) -> None:
    grid = BlockGrid.of((64, 64, *kernel), (32, 32))
    packed = grid.pack(torch.randn(64, 64, *kernel))
    one = (1,) * len(kernel)
    with float32_precision("ieee"):
        layer = PackedConv(packed, None, grid, one, one, one, None, "triton").to(DEVICE)
        layer.choose_engine()
        assert layer.engine == "triton"
        layer.values.requires_grad_()
        x = torch.randn(1, 64, *(4,) * len(kernel), device=DEVICE)
        before = layer(x).detach()
        with torch.no_grad():
            layer.values *= 2
        torch.testing.assert_close(layer(x).detach(), 2 * before)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), 2 * before)


class NoWaiting(TorchDispatchMode):
    """Lets views and allocations pass and refuses everything else, above all what reads a tensor on the host."""

    ALLOWED = ("empty", "permute", "slice", "fill_")  # the last writes the NaN with which outputs start here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in self.ALLOWED:
            raise AssertionError(f"{func} in a forward")
        return func(*args, **(kwargs or {}))


def no_waiting() -> NoWaiting:
    return NoWaiting()  # type: ignore[no-untyped-call]


FORMS: dict[str, dict[str, Any]] = {
    "gather": {"kernel": "gather", "rows_per_union": 2},
    "bitmask": {"kernel": "bitmask"},
    "3xtf32": {"precision": "3xtf32"},
    "split": {"rows_per_union": 1, "tile": 0, "splits": 2, "pixels": 50},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_forward_allocates_and_launches_and_does_nothing_else(
    engine: ModuleType, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    for name in ("triton_gather", "triton_bitmask"):
        module = importlib.import_module(f"fxdbsr.kernels.{name}")
        monkeypatch.setattr(module, "launch", lambda *_, name=name: launched.append(name))
    data = build(Case(outputs=128, size=(5, 5)), torch.float32)
    values, crow, col = (t.to(DEVICE) for t in data.grid.pack(data.weight.float(), data.keep))
    assert data.bias is not None
    x = data.input.to(DEVICE, torch.float32).contiguous(memory_format=torch.channels_last)
    residual = torch.zeros(2, 128, 5, 5, device=DEVICE).contiguous(memory_format=torch.channels_last)
    bias = data.bias.to(DEVICE, torch.float32)
    with float32_precision("ieee" if form.get("precision") else "tf32"):
        tables = engine.tables(data.grid, values, crow, col, (1, 1), (1, 1), (1, 1), **form)
        rest = (64, 128, (1, 1), (1, 1), (1, 1), 1, "relu", 0.0)
        with no_waiting():
            engine.conv(x, values, crow, col, bias, residual, tables, *rest)
    assert launched == ["triton_bitmask" if form.get("kernel") == "bitmask" else "triton_gather"]


def test_reading_a_tensor_on_the_host_is_refused_there() -> None:
    x = torch.zeros(1)
    with no_waiting(), pytest.raises(AssertionError, match=r"_local_scalar_dense.* in a forward"):
        x.item()


SIZES = {"3x3": (2, 64, 5, 5), "one pixel": (1, 64, 1, 1), "one image": (1, 64, 3, 2), "no images": (0, 64, 3, 3)}


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "contiguous"])
@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
def test_a_compiler_is_told_the_strides_that_come(engine: ModuleType, shape: tuple[int, ...], last: bool) -> None:
    grid = BlockGrid.of((48, 64, 3, 3), (16, 32))
    packed = [t.to(DEVICE) for t in grid.pack(torch.randn(48, 64, 3, 3))]
    tables = engine.tables(grid, *packed, (1, 1), (1, 1), (1, 1))
    x = torch.randn(shape, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    rest: tuple[Any, ...] = (None, None, tables, 64, 48, [1, 1], [1, 1], [1, 1], 1, "relu", 0.0, "triton")
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, *packed)]
        told = torch.ops.fxdbsr.conv(*fakes, *rest[:2], [mode.from_tensor(t) for t in tables], *rest[3:])
    expected = torch.ops.fxdbsr.conv(x, *packed, *rest)
    assert (told.shape, told.stride(), told.dtype) == (expected.shape, expected.stride(), expected.dtype)
