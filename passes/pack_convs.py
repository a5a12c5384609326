"""scaled conv(x) -> packed conv(x): the blocks that are not zero, and the engine that multiplies them.

A conv without block scales goes to an engine whole where that is faster than torch's own (`why_kept`). What no
engine packs (transposed convs whose kernels overlap or whose calls give a size, layers with hooks) becomes the torch
layer again, with the zeros in its weight; `fxdbsr.nn.lift.why_unpacked` says why.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from fxdbsr.blocks import BlockGrid
from fxdbsr.graph import called_module
from fxdbsr.kernels.choice import why_not
from fxdbsr.nn.lift import why_unpacked
from fxdbsr.nn.packed import PackedConv
from fxdbsr.nn.scaled import ScaledLayer, plain_type, why_unscalable
from fxdbsr.passes.lowering import Lowering

WHOLE = (32, 32)  # blocks of a conv that is packed with all its weights


def pack_convs(model: fx.GraphModule, lowering: Lowering) -> None:
    """Replace every scaled layer by a packed conv, or by the torch layer where it cannot be packed."""
    layers = {str(n.target): m for n in model.graph.nodes if isinstance(m := called_module(n), ScaledLayer)}
    for node in model.graph.nodes:
        if node.target in layers and len(node.args) + len(node.kwargs) > 1:
            layers[str(node.target)].chooses_size = True  # type: ignore[assignment]
    for name, layer in layers.items():
        if why_unpacked(layer) is None:
            model.set_submodule(name, packed(layer, layer.grid, lowering.backend))
        else:
            unscale_(layer)
    whole = {str(n.target): m for n in model.graph.nodes if isinstance(m := called_module(n), nn.Conv2d)}
    for name, conv in whole.items():
        if why_kept(conv, lowering.backend) is None:
            model.set_submodule(name, packed_whole(conv, lowering.backend))


def why_kept(conv: nn.Module, backend: str) -> str | None:
    """Why `conv`, which has no blocks, stays torch's own, as a sentence, or None where the CPU engine takes it."""
    if backend not in ("auto", "cpu"):
        return f"the {backend} backend takes blocked convs only"
    reason = why_unscalable(conv)
    if reason is not None:
        return reason
    if conv._forward_hooks or conv._forward_pre_hooks:
        return "it has forward hooks"
    padding, _ = split_padding(conv)
    grid = BlockGrid.of(tuple(conv.weight.shape), WHOLE, conv.groups)  # type: ignore
    weight = conv.weight
    return why_not("cpu", grid, conv.stride, padding, conv.dilation, weight.dtype, weight.device)  # type: ignore


def packed_whole(conv: nn.Module, backend: str) -> PackedConv:
    """The packed conv with all of `conv`'s weights."""
    grid = BlockGrid.of(tuple(conv.weight.shape), WHOLE, conv.groups)  # type: ignore
    return packed(conv, grid, backend, blocked=False)


def packed(layer: nn.Module, grid: BlockGrid, backend: str, blocked: bool = True) -> PackedConv:
    """The packed conv with `layer`'s weight, whose scales must be folded."""
    padding, pad = split_padding(layer) if grid.kernel_size else ((), None)
    weight = layer.weight.detach()  # type: ignore[operator]
    keep = None if blocked else torch.ones(grid.shape, dtype=torch.bool, device=weight.device)
    found = PackedConv(
        grid.pack(weight, keep),
        layer.bias,  # type: ignore[arg-type]
        grid,
        getattr(layer, "stride", ()),
        padding,
        getattr(layer, "dilation", ()),
        pad,
        backend,
        blocked,
        getattr(layer, "output_padding", ()) if grid.transposed else (),
        size_of(layer),
    )
    found.dense_grid = getattr(layer, "dense_grid", grid)
    found.kept_channels = getattr(layer, "kept_channels", "")
    found.choose_engine()
    return found.eval()


def size_of(layer: nn.Module) -> tuple[int, ...] | None:
    """Batch and size of the input of `layer`, lifted, by the output that it recorded first, as if that had equal sides.

    The batch is 0, as it is not known; a linear layer has `(M, 1, 1)`. None where nothing was recorded.
    """
    positions = getattr(layer, "positions", [])
    if not positions:
        return None
    axes = len(layer.grid.kernel_size)  # type: ignore[union-attr, arg-type]
    if axes == 0:
        return (positions[0], 1, 1)
    strides: list[int] = [1] * axes if layer.grid.transposed else list(layer.stride)  # type: ignore[union-attr, arg-type]
    side = round(positions[0] ** (1 / axes))
    return (0, *(1,) * (2 - axes), *(side * stride for stride in strides))


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
