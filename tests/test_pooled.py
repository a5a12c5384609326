"""Max pools inside of the convs before them: the bits of two steps, in one kernel, where nothing looks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxdbsr
from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.ops import is_watched
from fxdbsr.network.pooled import pooled_forward, pools_of
from fxdbsr.nn.packed import PackedConv
from tests.gpu_stand_in import on_a_gpu
from tests.triton_cases import DEVICE, imported, needs_interpreter

LAST = torch.channels_last


@pytest.fixture(scope="module")
def engine() -> Iterator[ModuleType]:
    with imported() as module:
        yield module


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def by_kernel(
    engine: ModuleType, x: Tensor, block: tuple[int, int], dtype: torch.dtype, groups: int = 1, **form: Any
) -> Callable[[int], Tensor]:
    """A 3x3 conv of `x` to 64 outputs with half of its blocks, bias and ReLU, as a function of the pool's side."""
    grid = BlockGrid.of((64, x.shape[1] // groups, 3, 3), block, groups)
    mask = torch.rand(grid.shape) < 0.5
    mask[0, 0] = True
    weight = (torch.randn(grid.weight_shape) / 20 * grid.expand_mask(mask)).to(DEVICE, dtype)
    bias = torch.randn(64).to(DEVICE, dtype)
    packed = grid.pack(weight, mask.to(DEVICE))
    geometry = ((1, 1), (1, 1), (1, 1))
    tables = engine.tables(grid, *packed, *geometry, **form)
    last = x.to(DEVICE, dtype).contiguous(memory_format=LAST)
    arguments = (last, *packed, bias, None, tables, x.shape[1], 64, *geometry, groups, "relu", 0.0)
    return lambda pool: engine.conv(*arguments, pool=pool)


FORMS: dict[str, dict[str, Any]] = {
    "rows alone": {"rows_per_union": 1},
    "two rows": {"rows_per_union": 2},
    "3xTF32": {"precision": "3xtf32", "dtype": torch.float32},
    "ieee": {"dtype": torch.float32},
    "narrow blocks": {"block": (8, 8)},
    "tall blocks": {"block": (64, 16)},
    "edge blocks": {"block": (48, 24)},
    "groups": {"groups": 2, "block": (16, 16)},
    "bitmask, by a pool of its own": {"kernel": "bitmask"},
}


@needs_interpreter
@pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=["even", "odd"])
@pytest.mark.parametrize("name", FORMS)
def test_a_conv_that_pools_gives_the_bits_of_two_steps(engine: ModuleType, name: str, size: tuple[int, int]) -> None:
    form = {"block": (32, 32), "dtype": torch.float16, **FORMS[name]}
    run = by_kernel(engine, torch.randn(3, 64, *size), form.pop("block"), form.pop("dtype"), **form)
    y = run(2)
    assert y.shape == (3, 64, size[0] // 2, size[1] // 2)
    assert y.is_contiguous(memory_format=LAST)
    assert torch.equal(y, F.max_pool2d(run(1), 2))


@needs_interpreter
def test_more_windows_than_a_tile_and_a_tile_that_they_do_not_fill(engine: ModuleType) -> None:
    run = by_kernel(engine, torch.randn(2, 64, 18, 22), (32, 32), torch.float16)
    assert torch.equal(run(2), F.max_pool2d(run(1), 2))


@needs_interpreter
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_passes_as_through_two_steps(engine: ModuleType, value: float) -> None:
    x = torch.randn(2, 64, 6, 6)
    x[0, :, 2, 3] = value
    run = by_kernel(engine, x, (32, 32), torch.float16)
    y = run(2)
    assert not y.isfinite().all()
    torch.testing.assert_close(y, F.max_pool2d(run(1), 2), rtol=0, atol=0, equal_nan=True)


@needs_interpreter
def test_batches_that_need_several_launches(engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    run = by_kernel(engine, torch.randn(5, 64, 6, 6), (32, 32), torch.float16)
    expected = F.max_pool2d(run(1), 2)
    monkeypatch.setattr("fxdbsr.kernels.triton_run.LIMIT", 2 * 64 * 36 + 1)
    assert torch.equal(run(2), expected)


@needs_interpreter
def test_a_split_reduction_pools_afterwards(engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 256, 4, 4)
    tile: dict[str, Any] = {"rows_per_union": 1, "tile": 0, "splits": 4, "pixels": 16}
    run = by_kernel(engine, x, (32, 32), torch.float16, **tile)
    gather: Any = importlib.import_module("fxdbsr.kernels.triton_gather")
    reduce = Mock(side_effect=gather.reduce)
    monkeypatch.setattr(gather, "reduce", reduce)
    assert torch.equal(run(2), F.max_pool2d(run(1), 2))
    assert reduce.call_count == 2


class Net(nn.Sequential):
    """Convs before pools that they can take, and before pools that they cannot."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            activation or nn.LeakyReLU(0.1),
            nn.MaxPool2d((2, 2), (2, 2)),
            nn.Conv2d(32, 16, 1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )


def converted(backend: str = "reference", activation: nn.Module | None = None) -> Any:
    prepared = fxdbsr.prepare(Net(activation).eval(), 16)
    fxdbsr.block_prune_(prepared, 0.5)
    return fxdbsr.convert(prepared, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "dense", "cpu"])
@torch.no_grad()
def test_a_model_whose_convs_pool_computes_the_same(backend: str) -> None:
    model, x = converted(backend), torch.randn(2, 3, 19, 22)
    forward = pooled_forward(model)
    assert forward is not None
    torch.testing.assert_close(forward(model, x), model(x))
    torch.testing.assert_close(forward(model, x[:1].double().float()), model(x[:1]))


def test_pools_of_two_by_two_alone_go_into_convs() -> None:
    model = converted()
    assert [(str(conv.target), str(pool.target), side) for conv, (pool, side) in pools_of(model.graph).items()] == [
        ("0", "3", 2),
        ("4", "6", 2),
    ]


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(-0.5)], ids=str)
@torch.no_grad()
def test_a_pool_behind_an_activation_that_falls_stays(activation: nn.Module) -> None:
    model, x = converted(activation=activation), torch.randn(2, 3, 16, 16)
    assert len(pools_of(model.graph)) == 1
    forward = pooled_forward(model)
    assert forward is not None
    torch.testing.assert_close(forward(model, x), model(x))


class Twice(nn.Module):
    """Reads a conv's output beside the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 16, 3, padding=1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """The maxima and the mean."""
        y = torch.relu(self.conv(x))
        found: Tensor = self.pool(y) + y.mean()
        return found


def test_an_output_that_something_else_reads_stays_whole() -> None:
    model: Any = fxdbsr.convert(fxdbsr.prepare(Twice().eval(), 8))
    assert pools_of(model.graph) == {}
    assert pooled_forward(model) is None


def test_conversion_notes_the_pool_and_a_file_keeps_it(tmp_path: Path) -> None:
    model = converted()
    sides = {name: m.pool for name, m in model.named_modules() if isinstance(m, PackedConv)}
    assert sides == {"0": 2, "4": 2, "7": 1}
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = fxdbsr.load(Net().eval(), tmp_path / "state.pt")
    assert {name: m.pool for name, m in loaded.named_modules() if isinstance(m, PackedConv)} == sides


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pools that convs are asked for, in a process that takes tensors of a stand-in for its own."""
    sides: list[int] = []
    forward = PackedConv.forward

    def noting(self: PackedConv, input: Tensor, residual: Tensor | None = None, pool: int = 1) -> Tensor:
        sides.append(pool)
        return forward(self, input, residual, pool)

    monkeypatch.setattr(PackedConv, "forward", noting)
    name = "fxdbsr.network.runner.is_watched"
    monkeypatch.setattr(name, lambda *tensors: is_watched(*(t.as_subclass(Tensor) for t in tensors)))
    return sides


@torch.no_grad()
def test_on_a_gpu_convs_pool(seen: list[int]) -> None:
    model, x = converted(), torch.randn(2, 3, 16, 16)
    y = model(on_a_gpu(x))
    assert seen == [2, 2, 1]
    seen.clear()
    torch.testing.assert_close(y.as_subclass(Tensor), torch.nn.Sequential(*model.children())(x))


def hooked(model: Any, x: Tensor) -> Any:
    model.get_submodule("3").register_forward_hook(lambda *_: None)
    return model(x)


def training(model: Any, x: Tensor) -> Any:
    return model.train()(x)


def with_gradients(model: Any, x: Tensor) -> Any:
    with torch.enable_grad():
        return model(x.requires_grad_())


def in_autocast(model: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def profiled(model: Any, x: Tensor) -> Any:
    with torch.profiler.profile():
        return model(x)


@pytest.mark.parametrize("look", [hooked, training, with_gradients, profiled], ids=lambda look: look.__name__)
@torch.no_grad()
def test_where_something_looks_pools_run_by_themselves(look: Callable[..., Any], seen: list[int]) -> None:
    look(converted(), on_a_gpu(torch.randn(2, 3, 16, 16)))
    assert seen == [1, 1, 1]


@torch.no_grad()
def test_a_pool_that_is_exchanged_is_seen(seen: list[int]) -> None:
    model, x = converted(), on_a_gpu(torch.randn(2, 3, 16, 16))
    model(x)
    model.set_submodule("3", nn.AvgPool2d(2))
    seen.clear()
    model(x)
    assert seen == [1, 2, 1]
