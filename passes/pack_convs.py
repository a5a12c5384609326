"""scaled conv(x) -> packed conv(x): the blocks that are not zero, and the engine that multiplies them.

Packed convs give channels-last tensors, which not every `view` can take: views become reshapes.
What no engine packs (transposed convs, linear layers, layers with hooks) becomes the torch layer again, with
the zeros in its weight; `fxdbsr.nn.packed.why_unpacked` says why.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from fxdbsr.graph import called_module
from fxdbsr.nn.packed import PackedConv, why_unpacked
from fxdbsr.nn.scaled import ScaledLayer, plain_type
from fxdbsr.passes.lowering import Lowering


def pack_convs(model: fx.GraphModule, lowering: Lowering) -> None:
    """Replace every scaled layer by a packed conv, or by the torch layer where it cannot be packed."""
    for node in model.graph.nodes:
        if (
            node.op == "call_method"
            and node.target == "view"
            and not any(isinstance(a, torch.dtype) for a in node.args)
        ):
            node.target = "reshape"
    layers = {str(n.target): m for n in model.graph.nodes if isinstance(m := called_module(n), ScaledLayer)}
    for name, layer in layers.items():
        if why_unpacked(layer) is None:
            model.set_submodule(name, packed(layer, lowering.backend))
        else:
            unscale_(layer)


def packed(layer: ScaledLayer, backend: str) -> PackedConv:
    """The packed conv with `layer`'s weight, whose scales must be folded."""
    padding, pad = split_padding(layer)
    conv = PackedConv(
        layer.weight,
        layer.bias,  # type: ignore[arg-type]
        layer.grid,
        layer.stride,  # type: ignore[arg-type]
        padding,
        layer.dilation,  # type: ignore[arg-type]
        pad,
        backend,
    )
    conv.dense_grid = getattr(layer, "dense_grid", layer.grid)
    conv.kept_channels = getattr(layer, "kept_channels", "")
    return conv.eval()


def split_padding(conv: nn.Module) -> tuple[tuple[int, ...], tuple[tuple[int, ...], str] | None]:
    """`conv`'s padding as (zeros on both sides of each axis, arguments of an `F.pad` before it or None)."""
    none = (0,) * len(conv.kernel_size)  # type: ignore[arg-type]
    if conv.padding_mode != "zeros":
        return none, (tuple(conv._reversed_padding_repeated_twice), conv.padding_mode)  # type: ignore
    if conv.padding == "valid":
        return none, None
    if conv.padding != "same":
        return tuple(conv.padding), None  # type: ignore[arg-type]
    total = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]  # type: ignore
    if all(t % 2 == 0 for t in total):
        return tuple(t // 2 for t in total), None
    return none, (tuple(side for t in reversed(total) for side in (t // 2, t - t // 2)), "constant")


def unscale_(layer: ScaledLayer) -> None:
    """Turn `layer` back into its torch class, in place; it keeps its grid for the report."""
    kind = plain_type(type(layer))
    assert kind is not None
    del layer.scale, layer.mask
    layer.__class__ = kind  # type: ignore[assignment]
