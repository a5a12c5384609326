"""The rule of each operation. Operations without a rule read all channels of all their arguments."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxdbsr.channels.items import item, narrow, select
from fxdbsr.channels.layout import cat, chunk, expand, pad, pixel_shuffle, squeezed, unbind
from fxdbsr.channels.rules import (
    PRODUCTS,
    Rule,
    average_pool,
    binary,
    dropout,
    elementwise,
    max_pool,
    mean,
    prelu,
    same,
    spatial,
)
from fxdbsr.channels.views import channel_shuffle, flatten, moved, unflatten, view

_BINARY = {
    *PRODUCTS,
    *(operator.add, operator.iadd, torch.add, "add", "add_"),
    *(operator.sub, operator.isub, torch.sub, "sub", "sub_"),
    *(operator.truediv, operator.itruediv, torch.div, "div", "div_"),
    *(torch.maximum, torch.minimum),
}
_ELEMENTWISE = {
    *(nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU),
    *(nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.LogSigmoid),
    *(F.relu, F.relu_, F.relu6, F.silu, F.gelu, F.sigmoid, F.tanh, F.hardswish, F.hardsigmoid, F.leaky_relu),
    *(F.elu, F.selu, F.celu, F.mish, F.softplus, F.softsign, F.hardtanh, F.logsigmoid),
    *(torch.relu, torch.relu_, torch.sigmoid, torch.sigmoid_, torch.tanh, torch.tanh_, torch.abs, torch.neg),
    *(torch.clamp, torch.square, torch.sqrt, torch.exp, operator.neg, operator.abs, operator.pow, torch.pow),
    *("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "abs", "neg", "clamp", "clamp_", "square", "exp"),
    *("pow", "sqrt"),
}
RULES: dict[Any, Rule] = {
    **dict.fromkeys(_BINARY, binary),
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys((nn.Identity, "contiguous", "clone", "detach"), same),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), spatial(None, same)),
    **dict.fromkeys((F.interpolate, F.upsample), spatial(None, same)),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), dropout),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), dropout),
    **dict.fromkeys((torch.mean, "mean", torch.amax, "amax", torch.amin, "amin"), mean),
    **dict.fromkeys(("view", "reshape", torch.reshape), view),
    **dict.fromkeys((torch.permute, "permute", torch.transpose, "transpose", torch.swapaxes, "swapaxes"), moved),
    **dict.fromkeys((torch.movedim, "movedim"), moved),
    **dict.fromkeys((torch.flatten, nn.Flatten, "flatten"), flatten),
    **dict.fromkeys((torch.unflatten, nn.Unflatten, "unflatten"), unflatten),
    **dict.fromkeys((torch.squeeze, "squeeze", torch.unsqueeze, "unsqueeze"), squeezed),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), cat),
    **dict.fromkeys((torch.chunk, torch.split, "chunk", "split"), chunk),
    **dict.fromkeys((torch.unbind, "unbind"), unbind),
    **dict.fromkeys(("expand", "expand_as"), expand),
    **dict.fromkeys((F.pixel_shuffle, nn.PixelShuffle), pixel_shuffle),
    **dict.fromkeys((F.channel_shuffle, nn.ChannelShuffle), channel_shuffle),
    **dict.fromkeys((torch.select, "select"), select),
    **dict.fromkeys((torch.narrow, "narrow"), narrow),
    F.pad: pad,
    nn.PReLU: prelu,
    operator.getitem: item,
}
for _axes, _max, _average, _adaptive in (
    (1, (nn.MaxPool1d, F.max_pool1d), (nn.AvgPool1d, F.avg_pool1d), (nn.AdaptiveAvgPool1d, F.adaptive_avg_pool1d)),
    (2, (nn.MaxPool2d, F.max_pool2d), (nn.AvgPool2d, F.avg_pool2d), (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d)),
    (3, (nn.MaxPool3d, F.max_pool3d), (nn.AvgPool3d, F.avg_pool3d), (nn.AdaptiveAvgPool3d, F.adaptive_avg_pool3d)),
):
    RULES |= dict.fromkeys(_max, spatial(_axes, max_pool)) | dict.fromkeys(_average, spatial(_axes, average_pool))
    RULES |= dict.fromkeys(_adaptive, spatial(_axes, same))

ALIASES = (same, dropout, item, view, moved, flatten, unflatten, squeezed, chunk, unbind, expand, narrow, select)


def rule_of(node: fx.Node, module: nn.Module | None) -> Rule | None:
    """The rule for what `node` calls, the `module` where it is one, or None."""
    if module is not None:
        return RULES.get(type(module))
    if node.op not in ("call_function", "call_method"):
        return None
    name, home = getattr(node.target, "__name__", ""), getattr(node.target, "__module__", "")
    if name == "stochastic_depth" and home.startswith("torchvision."):
        return dropout
    return RULES.get(node.target)
