"""Convs on which the Triton engine is held against float64, and how its kernels get interpreted without a GPU.

Triton decides when a kernel module is imported whether its kernels are compiled or interpreted. `imported`
therefore imports a second copy of the engine's modules under TRITON_INTERPRET=1 and puts the first ones back
afterwards, so that other test files in the same process see kernels that compile.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels import reference
from fxdbsr.kernels.geometry import output_size

triton = pytest.importorskip("triton")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")

needs_interpreter = pytest.mark.skipif(
    not GPU
    and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4),
    reason="the interpreter of Triton before 3.7 fails with numpy 2.4 and later",
)


@contextmanager
def imported() -> Iterator[ModuleType]:
    """`fxdbsr.kernels.triton`, its kernels interpreted where there is no GPU; `torch.empty` gives NaN meanwhile."""
    if GPU:
        with nan_outputs():
            yield importlib.import_module("fxdbsr.kernels.triton")
        return
    ours = "fxdbsr.kernels.triton"
    kept = forget(ours)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with nan_outputs():
            yield importlib.import_module(ours)
    forget(ours)
    package = importlib.import_module("fxdbsr.kernels")
    for name, module in kept.items():
        sys.modules[name] = module
        setattr(package, name.rpartition(".")[2], module)


@contextmanager
def nan_outputs() -> Iterator[None]:
    """Every `torch.empty` of floats holds NaN, so that unwritten elements fail."""
    empty = torch.empty

    def nans(*args: Any, **kwargs: Any) -> Tensor:
        tensor: Tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", nans)
        yield


def forget(prefix: str) -> dict[str, ModuleType]:
    """Take the modules whose names start with `prefix` out of the process, as if never imported."""
    package = importlib.import_module(prefix.rpartition(".")[0])
    taken = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(prefix)}
    for name in taken:
        delattr(package, name.rpartition(".")[2])
    return taken


@contextmanager
def float32_precision(value: str) -> Iterator[None]:
    """cuDNN's switch for float32 convs at "tf32" or "ieee"; afterwards all such switches are as they were."""
    switches: Any = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)  # type: ignore
    before = [switch.fp32_precision for switch in switches]
    torch.backends.cudnn.allow_tf32 = value == "tf32"  # the older switch: set by the newer one, it cannot be read
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0] == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = before[2] == "tf32"
        for switch, setting in zip(switches, before, strict=True):
            switch.fp32_precision = setting


@dataclass(frozen=True)
class Case:
    """A conv with random blocks; every default is the plainest choice."""

    channels: int = 64
    outputs: int = 64
    kernel: tuple[int, int] = (3, 3)
    size: tuple[int, int] = (6, 5)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    block: tuple[int, int] = (32, 32)
    density: float = 0.5
    batch: int = 2
    bias: bool = True
    residual: bool = True
    activation: str = "relu"
    form: dict[str, Any] = field(default_factory=dict)  # arguments of `engine.tables`

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return self.stride, self.padding, self.dilation

    @property
    def spatial(self) -> tuple[int, ...]:
        return output_size(self.size, self.kernel, *self.geometry)


@dataclass(frozen=True)
class Data:
    """Tensors of a case in float64, with values that its dtype holds exactly."""

    grid: BlockGrid
    weight: Tensor
    input: Tensor
    keep: Tensor
    bias: Tensor | None
    residual: Tensor | None


def build(case: Case, dtype: torch.dtype) -> Data:
    """Random tensors for `case`, the same at every call."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double()

    shape = (case.outputs, case.channels // case.groups, *case.kernel)
    grid = BlockGrid.of(shape, case.block, case.groups)
    keep = torch.rand(grid.shape, generator=generator) < case.density
    weight = random(*shape) * grid.expand_mask(keep)
    x = random(case.batch, case.channels, *case.size)
    bias = random(case.outputs) if case.bias else None
    residual = random(case.batch, case.outputs, *case.spatial) if case.residual else None
    return Data(grid, weight, x, keep, bias, residual)


def check(engine: ModuleType, case: Case, dtype: torch.dtype = torch.float32, precision: str = "ieee") -> None:
    """The engine's error against float64 is at most twice eager's plus one ulp of the largest output.

    `precision`: of float32 products, in eager and in the engine alike; the interpreter multiplies tf32 exactly,
    so that there the reference multiplies the rounded weights.
    """
    if dtype == torch.bfloat16 and not GPU:
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16")
    with float32_precision(precision):
        data = build(case, dtype)
        assert engine.why_not(data.grid, *case.geometry, dtype, DEVICE) is None
        weight = data.weight.to(dtype)
        tf32 = dtype == torch.float32 and precision == "tf32" and not case.form.get("precision")
        exact = dense(case, data, torch.float64, rounded(weight) if tf32 and not GPU else weight)
        eager = dense(case, data, dtype, rounded(weight) if tf32 and not GPU else weight)
        y = sparse(engine, case, data, dtype)
    assert y.dtype == dtype
    assert y.shape == exact.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    largest = exact.abs().max().item()
    allowed = 2 * (eager - exact).abs().max().item() + torch.finfo(dtype).eps * largest
    error = (y - exact).abs().max().item()
    assert error <= allowed  # false for NaN


def rounded(weight: Tensor) -> Tensor:
    """`weight` as tf32 holds it."""
    module = importlib.import_module("fxdbsr.kernels.triton_pack")
    found: Tensor = module.round_to_tf32(weight)
    return found


def dense(case: Case, data: Data, to: torch.dtype, weight: Tensor) -> Tensor:
    """The case by torch's own conv in dtype `to`."""
    bias = None if data.bias is None else data.bias.to(DEVICE, to)
    y = F.conv2d(data.input.to(DEVICE, to), weight.to(DEVICE, to), bias, *case.geometry, case.groups)
    y = y if data.residual is None else y + data.residual.to(DEVICE, to)
    return reference.activate(y, case.activation)


def sparse(engine: ModuleType, case: Case, data: Data, dtype: torch.dtype) -> Tensor:
    """The case by the engine."""
    values, crow, col = (t.to(DEVICE) for t in data.grid.pack(data.weight.to(dtype), data.keep))
    y: Tensor = engine.conv(
        data.input.to(DEVICE, dtype),
        engine.layout(values),
        crow,
        col,
        None if data.bias is None else data.bias.to(DEVICE, dtype),
        None if data.residual is None else data.residual.to(DEVICE, dtype),
        engine.tables(data.grid, values, crow, col, *case.geometry, **case.form),
        case.channels,
        case.outputs,
        *case.geometry,
        case.groups,
        case.activation,
        0.01,
    )
    return y
