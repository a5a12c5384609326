"""Conv and linear layers for training: each block of the weight carries a trainable scale (`fxdbsr.nn.scaling`).

    forward(x) = conv(x, expand(s) * weight)

`scale` (parameter) and `mask` (boolean buffer) lie over the grid of blocks (`fxdbsr.blocks`).
"""

from __future__ import annotations

import sys
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fxdbsr.blocks import BlockGrid
from fxdbsr.config import Form
from fxdbsr.nn.leaf import call_in_graph
from fxdbsr.nn.scaling import keeping_float32, ones_like_scales, scale_blocks


class Blocked(nn.Module):
    """What every layer over a blocked weight knows: its grid and how often it multiplies a weight.

    Attributes:
        grid: the blocks of the weight.
        form: "product", "clamp" or "mask".
        calls: how often one forward of the model calls this layer.
        positions: for each recorded call, how often it multiplies every weight for one sample: the product
            of the output's spatial size (of the input's for a transposed conv, of the axes between the
            first and the last for a linear layer). The first `calls` calls are recorded.
    """

    is_leaf_in_trace = True
    grid: BlockGrid
    form: Form
    calls: int
    positions: list[int]

    def block_(self, grid: BlockGrid, form: Form) -> None:
        """Set the attributes as they are before the first forward."""
        self.grid, self.form, self.calls, self.positions = grid, form, 1, []

    def record(self, x: Tensor, y: Tensor) -> None:
        """Note the positions of a call from `x` to `y`."""
        if len(self.positions) >= self.calls or torch.compiler.is_compiling():
            return
        axes = len(self.grid.kernel_size)
        spatial = (x if self.grid.transposed else y).shape[-axes:] if axes else y.shape[1:-1]
        self.positions.append(prod(int(n) for n in spatial))


def record_whole_forward(model: nn.Module) -> None:
    """Let every blocked layer of `model` record all calls of the model's next forward, however many there are."""
    for module in model.modules():
        if isinstance(module, Blocked):
            module.calls = sys.maxsize
    model.register_forward_hook(_close_records)


def _close_records(model: nn.Module, args: Any, output: Any) -> None:
    for module in model.modules():
        if isinstance(module, Blocked) and module.positions:
            module.calls = len(module.positions)


class ScaledLayer(Blocked):
    """A conv or linear layer whose own weight is blocked; mixed into the torch class."""

    weight: Any
    scale: nn.Parameter
    mask: Tensor

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(keeping_float32(fn, [self.scale]), recurse)  # type: ignore[no-untyped-call]

    def scaled_weight(self, for_conv: bool = False) -> Tensor:
        """`expand(s) * weight`, shaped like the weight; `for_conv`: one conv or linear layer is all that reads it."""
        return scale_blocks(self.weight, self.scale, self.mask, self.grid, self.form, for_conv)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights as the torch class draws them, scales of one and all blocks on: also for what `to_empty` has made."""
        super().reset_parameters()  # type: ignore[misc]
        self.scale.fill_(1)
        self.mask.fill_(True)

    def extra_repr(self) -> str:
        """The torch class's own, and the block size."""
        return f"{super().extra_repr()}, block_size={self.grid.block_size}"


class _ScaledConv(ScaledLayer):
    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return call_in_graph(self, input)
        y: Tensor = self._conv_forward(input, self.scaled_weight(for_conv=True), self.bias)  # type: ignore[operator]
        self.record(input, y)
        return y


class ScaledConv1d(_ScaledConv, nn.Conv1d):
    """nn.Conv1d with block scales."""


class ScaledConv2d(_ScaledConv, nn.Conv2d):
    """nn.Conv2d with block scales."""


class ScaledConv3d(_ScaledConv, nn.Conv3d):
    """nn.Conv3d with block scales."""


class _ScaledConvTranspose(ScaledLayer):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if isinstance(input, fx.Proxy):
            return call_in_graph(self, input, output_size)
        axes = len(self.grid.kernel_size)
        extra = self._output_padding(  # type: ignore[operator]
            input, output_size, self.stride, self.padding, self.kernel_size, axes, self.dilation
        )
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
        y = function(
            input,
            self.scaled_weight(for_conv=True),
            self.bias,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            extra,
            self.groups,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
        )
        self.record(input, y)
        return y


class ScaledConvTranspose1d(_ScaledConvTranspose, nn.ConvTranspose1d):
    """nn.ConvTranspose1d with block scales."""


class ScaledConvTranspose2d(_ScaledConvTranspose, nn.ConvTranspose2d):
    """nn.ConvTranspose2d with block scales."""


class ScaledConvTranspose3d(_ScaledConvTranspose, nn.ConvTranspose3d):
    """nn.ConvTranspose3d with block scales."""


class ScaledLinear(ScaledLayer, nn.Linear):
    """nn.Linear with block scales."""

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear."""
        if isinstance(input, fx.Proxy):
            return call_in_graph(self, input)
        y = F.linear(input, self.scaled_weight(for_conv=True), self.bias)
        self.record(input, y)
        return y


SCALED: dict[type[nn.Module], type[ScaledLayer]] = {
    nn.Conv1d: ScaledConv1d,
    nn.Conv2d: ScaledConv2d,
    nn.Conv3d: ScaledConv3d,
    nn.ConvTranspose1d: ScaledConvTranspose1d,
    nn.ConvTranspose2d: ScaledConvTranspose2d,
    nn.ConvTranspose3d: ScaledConvTranspose3d,
    nn.Linear: ScaledLinear,
}


def plain_type(layer: type[nn.Module]) -> type[nn.Module] | None:
    """The torch class among the keys of `SCALED` that `layer` derives from, or None."""
    return next((kind for kind in SCALED if issubclass(layer, kind)), None)


class ScaledFunction(Blocked):
    """A functional conv on a parameter of the model: `forward(x, weight, scale, mask, bias)`. No state.

    Args:
        function: `F.conv2d` or another of its family.
        arguments: its keyword arguments after bias (stride, padding, ...), constants.
    """

    def __init__(self, grid: BlockGrid, form: Form, function: Any, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.block_(grid, form)
        self.function, self.arguments = function, arguments

    def is_like(self, other: ScaledFunction) -> bool:
        """True where both compute the same of the same tensors."""
        mine, others = ((f.grid, f.form, f.function, f.arguments) for f in (self, other))
        return mine == others

    def forward(self, input: Tensor, weight: Tensor, scale: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
        """The function with the scaled weight."""
        if isinstance(input, fx.Proxy):
            return call_in_graph(self, input, weight, scale, mask, bias)
        scaled = scale_blocks(weight, scale, mask, self.grid, self.form)
        y: Tensor = self.function(input, scaled, bias, **self.arguments)
        self.record(input, y)
        return y


def scale_layer_(layer: nn.Module, grid: BlockGrid, form: Form, share: ScaledLayer | None = None) -> None:
    """Give `layer`, an instance of a key of `SCALED`, block scales of ones, in place.

    The module stays the same object (hooks, names and weights stay), its class becomes the scaled one.
    `share` is a layer with the same weight, whose scale and mask this one takes.
    """
    kind = plain_type(type(layer))
    assert kind is not None
    layer.__class__ = SCALED[kind]
    assert isinstance(layer, ScaledLayer)
    layer.block_(grid, form)
    if share is not None:
        layer.scale = share.scale
        layer.register_buffer("mask", share.mask)
        return
    layer.scale = ones_like_scales(grid, form, layer.weight)
    layer.register_buffer("mask", torch.ones_like(layer.scale, dtype=torch.bool, requires_grad=False))


def why_unscalable(layer: nn.Module) -> str | None:
    """Why `layer` cannot take block scales, as a sentence, or None where it can."""
    if isinstance(layer, ScaledLayer):
        return None
    kind = plain_type(type(layer))
    name = type(layer).__name__
    if kind is None:
        return f"{name} is not a conv or linear layer"
    if parametrize.is_parametrized(layer):
        return "its parameters are parametrized"
    for method in ("forward", "_conv_forward"):
        if getattr(type(layer), method, None) is not getattr(kind, method, None):
            return f"{name} overrides {method}"
    for attribute in ("scale", "mask"):
        if hasattr(layer, attribute):
            return f"{name} has another {attribute}"
    if "forward" in layer.__dict__:
        return "its forward is replaced on the instance"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a hook"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is not initialised yet"
    if weight.numel() == 0:
        return f"its weight {tuple(weight.shape)} is empty"
    return None


def check_weight(weight: Tensor, name: str) -> None:
    """Refuse weights that no scale can multiply.

    Raises:
        TypeError: integer or complex weights; the message names the layer.
    """
    if not weight.dtype.is_floating_point:
        raise TypeError(f"{name}: expected floating-point weights, got {weight.dtype}")
