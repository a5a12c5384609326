"""Functional convs, `F.conv2d(x, w, b)` and its family: which layer each stands for, what it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from fxdbsr.graph import get_attribute

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
FUNCTIONS: dict[Callable[..., Any], tuple[type[nn.Module], tuple[str, ...]]] = {
    F.conv1d: (nn.Conv1d, _CONV),
    F.conv2d: (nn.Conv2d, _CONV),
    F.conv3d: (nn.Conv3d, _CONV),
    F.conv_transpose1d: (nn.ConvTranspose1d, _TRANSPOSED),
    F.conv_transpose2d: (nn.ConvTranspose2d, _TRANSPOSED),
    F.conv_transpose3d: (nn.ConvTranspose3d, _TRANSPOSED),
    F.linear: (nn.Linear, ("input", "weight", "bias")),
}


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of the functional conv `node` by name."""
    return dict(zip(FUNCTIONS[node.target][1], node.args, strict=False)) | node.kwargs  # type: ignore[index]


def why_unscalable_call(node: fx.Node) -> str | None:
    """Why the functional conv `node` cannot take block scales, as a sentence, or None where it can."""
    arguments = arguments_of(node)
    weight = arguments.get("weight")
    model = node.graph.owning_module
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or model is None:
        return "its weight is computed in the forward"
    if not isinstance(get_attribute(model, str(weight.target)), nn.Parameter):
        return f"its weight {weight.target} is not a parameter"
    owner, _, leaf = str(weight.target).rpartition(".")
    holder = model.get_submodule(owner)
    if hasattr(holder, f"{leaf}_scale") != hasattr(holder, f"{leaf}_mask"):
        return f"the names {weight.target}_scale and {weight.target}_mask are taken"
    bias = arguments.get("bias")
    if isinstance(bias, fx.Node) and bias.op != "get_attr":
        return "its bias is computed in the forward"
    constants = [value for key, value in arguments.items() if key not in ("input", "weight", "bias")]
    dynamic: list[fx.Node] = []
    fx.node.map_arg(constants, dynamic.append)
    if dynamic:
        return f"its {dynamic[0]} is computed in the forward"
    return None
