"""What the CPU engine does itself of a converted graph: which node is which operation, on which values.

Images are values of shape [N, C, H, W], or [N, C] with H = W = 1. A node that is none of these operations runs as
torch's own, on the same memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxdbsr.graph import called_module
from fxdbsr.nn.packed import PackedConv

LINEAR_BYTES = 32 << 20  # of a linear layer's weight, of which the engine makes a copy; larger ones stay with torch


@dataclass(frozen=True)
class Image:
    """Shape of a value, without the batch: C channels of (H, W) pixels; `flat` where its tensor is [N, C]."""

    channels: int
    size: tuple[int, int]
    flat: bool = False

    def shape(self, batch: int) -> tuple[int, ...]:
        """Shape of the tensor."""
        return (batch, self.channels) if self.flat else (batch, self.channels, *self.size)

    def tensor(self, whole: torch.Tensor) -> torch.Tensor:
        """The tensor of the images `whole [N, H, W, C]`."""
        return whole.flatten(1) if self.flat else whole.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Operation:
    """A node that the engine runs.

    Args:
        kind: "conv", "linear", "max", "mean", or "same": the value of its input, maybe as [N, C].
        inputs: x, and of a conv the residual where there is one.
        layer: of a conv or linear.
        kernel, stride, padding: of pools.
        pool: windows of a conv's outputs, side by side, of which its value is the maxima.
    """

    kind: str
    inputs: tuple[fx.Node, ...]
    layer: PackedConv | nn.Linear | None = None
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    pool: tuple[int, int] = (1, 1)


def image_of(value: Any, batch: int, dtype: torch.dtype) -> Image | None:
    """The image that `value` is, or None where it is of another kind, batch or dtype."""
    if not isinstance(value, torch.Tensor) or value.dtype != dtype or value.dim() not in (2, 4):
        return None
    if value.shape[0] != batch or not 0 < value.numel() < 1 << 31:
        return None
    size = (int(value.shape[2]), int(value.shape[3])) if value.dim() == 4 else (1, 1)
    return Image(int(value.shape[1]), size, value.dim() == 2)


def operations_of(graph: fx.Graph, images: Mapping[fx.Node, Image]) -> dict[fx.Node, Operation]:
    """The operations among the nodes of `graph` on the values `images`."""
    found: dict[fx.Node, Operation] = {}
    for node in graph.nodes:
        operation = operation_of(node, images)
        if operation is not None and (operation.kind != "same" or operation.inputs[0] in found):
            found[node] = operation  # what torch makes torch also reshapes
    return found


def pools_in_convs(
    images: Mapping[fx.Node, Image], operations: Mapping[fx.Node, Operation]
) -> tuple[dict[fx.Node, Image], dict[fx.Node, Operation]]:
    """The same with maxima of 2 by 2 or fewer taken by the conv that they alone read, whose whole value nobody sees."""
    images, operations = dict(images), dict(operations)
    for node, pool in list(operations.items()):
        if pool.kind != "max" or pool.kernel != pool.stride or max(pool.kernel) > 2 or pool.padding != (0, 0):
            continue
        (source,) = pool.inputs
        conv = operations.get(source)
        if conv is not None and conv.kind == "conv" and len(conv.inputs) == len(source.users) == 1:
            operations[source], operations[node] = replace(conv, pool=pool.kernel), Operation("same", (source,))
            images[source] = images[node]
    return images, operations


def operation_of(node: fx.Node, images: Mapping[fx.Node, Image]) -> Operation | None:
    """The operation that `node` is, or None where torch runs it."""
    if node.op not in ("call_module", "call_function", "call_method") or node not in images:
        return None
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node) or node.kwargs or any(source not in images for source in node.all_input_nodes):
        return None
    module = called_module(node)
    if isinstance(module, PackedConv):
        return _conv(node, module, images)
    if type(module) is nn.Linear:
        small = module.weight.numel() * module.weight.element_size() <= LINEAR_BYTES
        return Operation("linear", (x,), module) if images[x].flat and small else None
    return (None if images[x].flat else _pool(node, x, module, images[x])) or _same(node, x, module, images)


def _conv(node: fx.Node, layer: PackedConv, images: Mapping[fx.Node, Image]) -> Operation | None:
    inputs = tuple(argument for argument in node.args if isinstance(argument, fx.Node))
    if layer.engine != "cpu" or layer.pad is not None or len(inputs) < len(node.args):
        return None
    if layer.lift is not None or images[inputs[0]].flat:
        linear = not layer.grid.kernel_size and images[inputs[0]].flat and len(inputs) == 1
        return Operation("linear", inputs, layer) if linear else None
    fits = all(images[residual] == images[node] for residual in inputs[1:])
    return Operation("conv", inputs, layer) if fits else None


def _pool(node: fx.Node, x: fx.Node, module: nn.Module | None, image: Image) -> Operation | None:
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        kernel, stride, padding = (_pair(v) for v in (module.kernel_size, module.stride, module.padding))
        if module.ceil_mode or kernel is None or stride is None or padding is None:
            return None
        if isinstance(module, nn.AvgPool2d):
            plain = module.divisor_override is None and padding == (0, 0)
            return Operation("mean", (x,), None, kernel, stride) if plain else None
        plain = not module.return_indices and _pair(module.dilation) == (1, 1)
        return Operation("max", (x,), None, kernel, stride, padding) if plain else None
    whole = isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
    whole = whole or (node.target is F.adaptive_avg_pool2d and node.args[1:] in ((1,), ((1, 1),)))
    return Operation("mean", (x,), None, image.size, image.size) if whole else None


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    fits = isinstance(value, Sequence) and len(value) == 2 and all(isinstance(v, int) for v in value)
    return (value[0], value[1]) if fits else None


def _same(node: fx.Node, x: fx.Node, module: nn.Module | None, images: Mapping[fx.Node, Image]) -> Operation | None:
    passes = isinstance(module, nn.Identity | nn.Flatten) or (isinstance(module, nn.Dropout) and not module.training)
    passes = passes or (node.op != "call_module" and node.target in (torch.flatten, "flatten"))
    alike = (images[x].channels, images[x].size) == (images[node].channels, images[node].size)
    return Operation("same", (x,)) if passes and alike else None
