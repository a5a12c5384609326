"""What the CPU engine does itself of a converted graph: which node is which operation, on which values.

Images are values of shape [N, C, H, W], or [N, C] with H = W = 1. A node that is none of these operations runs as
torch's own, on views of the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxdbsr.graph import called_module
from fxdbsr.nn.packed import PackedConv


@dataclass(frozen=True)
class Image:
    """Shape of a value, without the batch: C channels of (H, W) pixels; `flat` where its tensor is [N, C]."""

    channels: int
    size: tuple[int, int]
    flat: bool = False


@dataclass(frozen=True)
class Operation:
    """A node that the engine runs.

    Args:
        kind: "conv", "max", "mean" or "same" (the value of its input, as another shape).
        inputs: x, and for convs the residual where there is one.
        layer: the conv.
        kernel, stride, padding: of pools.
    """

    kind: str
    inputs: tuple[fx.Node, ...]
    layer: PackedConv | None = None
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)


def image_of(value: Any, batch: int, dtype: torch.dtype) -> Image | None:
    """The image that a recorded shape and dtype stand for, or None."""
    if not isinstance(value, torch.Tensor) or value.dtype != dtype or value.dim() not in (2, 4) or value.shape[0] != batch:
        return None
    if value.numel() == 0 or value.numel() >= 1 << 31:
        return None
    size = (int(value.shape[2]), int(value.shape[3])) if value.dim() == 4 else (1, 1)
    return Image(int(value.shape[1]), size, value.dim() == 2)


def operation_of(node: fx.Node, images: Mapping[fx.Node, Image]) -> Operation | None:
    """The operation that `node` is on the values `images`, or None where torch runs it."""
    if node not in images or not node.all_input_nodes or any(source not in images for source in node.all_input_nodes):
        return None
    if node.op not in ("call_module", "call_function", "call_method") or node.kwargs.keys() - {"residual"}:
        return None
    module = called_module(node)
    x = node.args[0]
    if not isinstance(x, fx.Node):
        return None
    if isinstance(module, PackedConv):
        return _conv(node, module, images)
    if images[x].flat:
        return _same(node, module, images)
    return _pool(node, module, images) or _same(node, module, images)


def _conv(node: fx.Node, layer: PackedConv, images: Mapping[fx.Node, Image]) -> Operation | None:
    inputs = tuple(node.all_input_nodes)
    plain = layer.engine == "cpu" and layer.pad is None and not images[inputs[0]].flat
    if not plain or len(inputs) != len(node.args) + len(node.kwargs):
        return None
    fits = all(images[residual] == images[node] for residual in inputs[1:])
    return Operation("conv", inputs, layer) if fits else None


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    fits = isinstance(value, Sequence) and len(value) == 2 and all(isinstance(v, int) for v in value)
    return (value[0], value[1]) if fits else None


def _pool(node: fx.Node, module: nn.Module | None, images: Mapping[fx.Node, Image]) -> Operation | None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        kernel, stride, padding = (_pair(v) for v in (module.kernel_size, module.stride, module.padding))
        mean = isinstance(module, nn.AvgPool2d)
        odd = module.ceil_mode or (module.divisor_override if mean else module.return_indices or _pair(module.dilation) != (1, 1))
        if kernel and stride and padding and not odd and not (mean and padding != (0, 0)):
            return Operation("mean" if mean else "max", (x,), None, kernel, stride, padding)
    whole = isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
    whole = whole or (node.target is F.adaptive_avg_pool2d and node.args[1:] in ((1,), ((1, 1),)))
    return Operation("mean", (x,), None, images[x].size) if whole else None


_SAME_MODULES: tuple[type[nn.Module], ...] = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten)
_SAME_FUNCTIONS: tuple[Callable[..., Any] | str, ...] = (torch.flatten, "flatten")


def _same(node: fx.Node, module: nn.Module | None, images: Mapping[fx.Node, Image]) -> Operation | None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    same = isinstance(module, _SAME_MODULES) and not module.training
    same = same or (node.op != "call_module" and node.target in _SAME_FUNCTIONS)
    alike = (images[x].channels, images[x].size) == (images[node].channels, images[node].size)
    return Operation("same", (x,)) if same and alike else None
