"""The convs of a network as conversion leaves them, and tensors to run them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import cycle
from math import ceil, prod
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fxdbsr
from bench.gpu_setting import by_heuristics
from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels import dense, reference
from fxdbsr.kernels import triton as engine
from fxdbsr.kernels.geometry import output_size
from fxdbsr.kernels.triton_device import device_of
from fxdbsr.kernels.triton_layer import Layer, random_columns
from fxdbsr.kernels.triton_roofline import choose, library_seconds, why_dense, why_sparse
from fxdbsr.kernels.triton_tune import wrong
from fxdbsr.nn.packed import PackedConv

LARGER_THAN_L2 = 160e6


@dataclass(frozen=True)
class Conv:
    """One distinct conv of a network, with its epilogue."""

    channels: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    size: tuple[int, int]
    residual: bool
    activation: str
    pool: int = 1

    @property
    def name(self) -> str:
        """Such as "64->256 1x1 at 56 +residual relu"."""
        text = f"{self.channels}->{self.outputs} {self.kernel[0]}x{self.kernel[1]} at {self.size[0]}"
        text += f" /{self.stride[0]}" if self.stride[0] > 1 else ""
        text += f" g{self.groups}" if self.groups > 1 else ""
        text += " +residual" * self.residual + (f" {self.activation}" if self.activation != "none" else "")
        return text + (f" pool {self.pool}" if self.pool > 1 else "")

    def layer(self, batch: int, dtype: torch.dtype, block: tuple[int, int], density: float) -> Layer:
        """The conv as the planner sees it, with a random choice of blocks."""
        grid = BlockGrid.of((self.outputs, self.channels // self.groups, *self.kernel), block, self.groups)
        columns = random_columns(grid, density)
        geometry = (self.stride, self.padding, (1, 1))
        found = Layer(grid, batch, self.size, *geometry, dtype, columns, True, self.residual, self.activation)
        return replace(found, pool=self.pool)

    def small(self) -> Conv:
        """The same conv, tiny."""
        channels, outputs = (min(n, 64) if self.groups == 1 else n for n in (self.channels, self.outputs))
        return replace(self, channels=channels, outputs=outputs, size=(self.kernel[0] + 2,) * 2)


@cache
def convs(model: str) -> dict[Conv, int]:
    """Distinct convs of a torchvision model at 224x224 after conversion, with their counts."""
    with torch.device("meta"):
        network = torchvision.models.get_model(model).eval()
    network.to_empty(device="cpu")
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data.fill_(1)  # any weights will do, but none may be zero
    fast = fxdbsr.convert(fxdbsr.prepare(network, (32, 32), inplace=True), backend="reference", inplace=True)
    found: dict[Conv, int] = {}

    def note(layer: PackedConv, inputs: tuple[Tensor | None, ...], _: Tensor) -> None:
        g, x = layer.grid, inputs[0]
        assert x is not None
        kernel, stride, padding = ((pair[0], pair[1]) for pair in (g.kernel_size, layer.stride, layer.padding))
        size = (x.shape[2], x.shape[3])
        has_residual = len(inputs) > 1 and inputs[1] is not None
        shape = (g.in_channels, g.out_channels, kernel, stride, padding, g.groups)
        conv = Conv(*shape, size, has_residual, layer.activation, layer.pool)
        found[conv] = found.get(conv, 0) + 1

    for module in fast.modules():
        if isinstance(module, PackedConv):
            module.register_forward_hook(note)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fast(torch.zeros(1, 3, 224, 224))
    return found


def convs_alone(model: str) -> dict[Conv, int]:
    """The same without the pools behind them, as they were measured when these were kernels of their own."""
    found: dict[Conv, int] = {}
    for conv, count in convs(model).items():
        alone = replace(conv, pool=1)
        found[alone] = found.get(alone, 0) + count
    return found


@dataclass
class Problem:
    """Tensors of one conv on the device: several inputs, more than the L2 holds, and one set of weights."""

    layer: Layer
    inputs: list[tuple[Tensor, Tensor | None]]
    weight: Tensor
    bias: Tensor
    packed: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, layer: Layer, device: torch.device, sets: int = 0) -> Problem:
        """Random tensors; `sets` inputs, 0: as many as exceed the L2."""
        generator = torch.Generator(device).manual_seed(0)
        grid = layer.grid
        spatial = output_size(layer.size, grid.kernel_size, *layer.geometry)
        keep = torch.tensor([[mask >> c & 1 for c in range(grid.shape[1])] for mask in layer.columns], dtype=torch.bool)

        def random(*shape: int) -> Tensor:
            last = torch.randn(shape[0], *shape[2:], shape[1], generator=generator, device=device)
            return last.to(layer.dtype).movedim(-1, 1)

        weight = torch.randn(grid.weight_shape, generator=generator, device=device) / prod(grid.weight_shape[1:]) ** 0.5
        weight = (weight * grid.expand_mask(keep.to(device))).to(layer.dtype)
        bias = torch.randn(grid.out_channels, generator=generator, device=device).to(layer.dtype)
        count = sets or min(16, max(2, ceil(LARGER_THAN_L2 / max(layer.full().bytes(layer.residual), 1))))
        inputs = []
        for _ in range(count):
            x = random(layer.batch, grid.in_channels, *layer.size)
            residual = random(layer.batch, grid.out_channels, *spatial) if layer.residual else None
            inputs.append((x, residual))
        packed = grid.pack(weight, keep.to(device))
        return cls(layer, inputs, weight.contiguous(memory_format=torch.channels_last), bias, packed)

    def in_turn(self, function: Callable[[Tensor, Tensor | None], Any]) -> Callable[[], Any]:
        """A function without arguments that takes the next of the inputs at every call."""
        turn = cycle(self.inputs)
        return lambda: function(*next(turn))

    def eager(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """cuDNN's conv, then add, activation and pool, as PyTorch runs them."""
        w, b = self.weight.to(x.dtype), self.bias.to(x.dtype)
        y = F.conv2d(x, w, b, *self.layer.geometry, self.layer.grid.groups)
        y = reference.activate(y if residual is None else y + residual, self.layer.activation)
        return y if self.layer.pool == 1 else F.max_pool2d(y, self.layer.pool)

    @cached_property
    def references(self) -> tuple[Tensor, Tensor]:
        """The first image of the first input through the conv: in float64, and eager."""
        x, residual = self.inputs[0]
        x, residual = x[:1], None if residual is None else residual[:1]
        with by_heuristics():
            exact = self.eager(x.double(), None if residual is None else residual.double())
        return exact, self.eager(x, residual)

    def fused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """What a dense layer of a converted model runs."""
        rest = (*self.layer.geometry, self.layer.grid.groups, self.layer.activation, 0.0, self.layer.pool)
        return dense.conv(x, self.weight, self.bias, residual, *rest)

    def sparse(self, on: torch.device | None = None, **form: Any) -> Callable[[Tensor, Tensor | None], Tensor]:
        """The engine, with tables made by `form`, moved to the device `on`."""
        layer, grid = self.layer, self.layer.grid
        tables = engine.tables(grid, *self.packed, *self.layer.geometry, **form)
        moved = [tensor.to(on or tensor.device) for tensor in (*self.packed, self.bias, *tables)]
        values, crow, col, bias = moved[:4]

        def run(x: Tensor, residual: Tensor | None) -> Tensor:
            sizes = (grid.in_channels, grid.out_channels)
            rest = (*sizes, *self.layer.geometry, grid.groups, layer.activation, 0.0, layer.pool)
            return engine.conv(x, values, crow, col, bias, residual, moved[4:], *rest)

        return run

    def dense_triton(self) -> Callable[[Tensor, Tensor | None], Tensor]:
        """The engine with all blocks."""
        grid = self.layer.grid
        keep = torch.ones(grid.shape, dtype=torch.bool, device=self.weight.device)
        full = replace(self, layer=self.layer.full(), packed=grid.pack(self.weight, keep))
        return full.sparse(**choose(full.layer, device_of(self.weight.device)).form.arguments)

    def why_wrong(self, run: Callable[[Tensor, Tensor | None], Tensor], repeats: int) -> str | None:
        """A sentence where a run fails, is off float64 by more than eager allows, or differs from the next; else None.

        Raises:
            RuntimeError: after the run nothing works on the GPU.
        """
        try:
            return self._why_wrong(run, repeats)
        except Exception as error:  # no resources, or no code for this GPU: other forms may do
            reason = f"{type(error).__name__}: {str(error)[-300:]}"
        if self.weight.is_cuda:
            try:
                torch.cuda.synchronize()
            except Exception as lost:
                raise RuntimeError(f"{reason}; {lost}") from lost
        return reason

    def _why_wrong(self, run: Callable[[Tensor, Tensor | None], Tensor], repeats: int) -> str | None:
        x, residual = self.inputs[0]
        y = run(x, residual)
        reason = wrong(y[:1], *self.references, prod(self.layer.grid.weight_shape[1:]))
        if reason is None and not all(torch.equal(run(x, residual), y) for _ in range(repeats)):
            reason = f"{repeats} runs were not equal"
        return reason


def chosen(layer: Layer, device: torch.device) -> dict[str, Any]:
    """Arguments of `engine.tables` for the form that the planner takes."""
    return choose(layer, device_of(device)).form.arguments


def estimate(layer: Layer) -> dict[str, Any]:
    """What the roofline of an H200 says of a layer, microseconds, and the planner's choice with its reason."""
    unable = engine.why_not(layer.grid, *layer.geometry, layer.dtype, torch.device("cuda"))
    if unable is not None:
        fastest = library_seconds(layer)
        return {
            "choice": "dense",
            "reason": unable,
            "estimated us": {name: round(1e6 * seconds, 2) for name, seconds in fastest.items()},
            "ceiling": 1.0,
        }
    reason, choice = why_dense(layer), choose(layer)
    return {
        "choice": "dense" if reason else "sparse",
        "reason": reason or why_sparse(layer),
        "form": str(choice.form),
        "estimated us": {
            "sparse": round(1e6 * choice.sparse, 2),
            choice.library: round(1e6 * choice.dense, 2),
            "dense Triton": round(1e6 * choice.dense_triton, 2),
        },
        "ceiling": round(choice.ceiling, 2),
    }
