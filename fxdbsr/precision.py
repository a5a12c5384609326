"""How a converted model forms float32 products on a GPU."""

from __future__ import annotations

from torch import nn

from fxdbsr.nn.packed import PackedConv
from fxdbsr.traced import unwrap

PRECISIONS = (None, "3xtf32")


def set_float32_precision(model: nn.Module, precision: str | None) -> nn.Module:
    """Let the float32 convs of a converted model run on tensor cores with float32 accuracy, or not; returns it.

    Args:
        model: from `convert`; changed in place. With `backend="auto"` its layers choose their engine anew.
        precision: "3xtf32": three products in tf32 for each in float32, for layers of the Triton engine; None:
            as cuDNN's switch says (`torch.backends.cudnn.conv.fp32_precision`), which dense layers always follow: set
            it to "ieee" for float32 accuracy in all of them. The error of a sum is that of float32; where float32
            gives an infinity, 3xTF32 gives NaN.

    Raises:
        ValueError: another precision; a model without packed convs. TypeError: `model` is no module.
    """
    root = unwrap(model)
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")
    layers = [module for module in root.modules() if isinstance(module, PackedConv)]
    if not layers:
        raise ValueError(f"model: expected a converted model, got {type(root).__name__} without packed convs")
    for layer in layers:
        layer.precision = precision
        layer.choose_engine()
    return model
