"""conv(x) -> scaled conv(x), where conv is a module whose weight the configuration blocks.

The module stays where it is and keeps its names; scales of ones leave its output as it was, bit for bit.
Modules that hold the same weight get the same scale, one module called twice is one layer.
"""

from __future__ import annotations

from collections import Counter

from torch import fx, nn

from fxdbsr.blocks import BlockGrid
from fxdbsr.nn.scaled import ScaledLayer, check_weight, scale_layer_, why_unscalable
from fxdbsr.passes.selection import Selection


def scale_layers(model: fx.GraphModule, selection: Selection) -> None:
    """Scale every layer of `selection` that the graph calls as a module."""
    calls = Counter(str(node.target) for node in model.graph.nodes if node.op == "call_module")
    layers = {name: model.get_submodule(name) for name in calls}
    grids = {
        name: grid for name, layer in layers.items() if (grid := grid_of_layer(layer, name, selection)) is not None
    }
    by_weight = {id(layer.weight): layer for layer in layers.values() if isinstance(layer, ScaledLayer)}
    for name, grid in grids.items():
        layer = layers[name]
        if not isinstance(layer, ScaledLayer):
            share = by_weight.get(id(layer.weight))
            if share is not None and share.grid != grid:
                continue
            scale_layer_(layer, grid, selection.config.form, share)
            by_weight.setdefault(id(layer.weight), layer)  # type: ignore[arg-type]
    for name, layer in layers.items():
        if isinstance(layer, ScaledLayer):
            layer.calls = calls[name]


def grid_of_layer(layer: nn.Module, name: str, selection: Selection) -> BlockGrid | None:
    """The grid that `selection` asks for on `layer`, or None where it is left alone.

    Raises:
        TypeError: the layer is selected and its weight is not floating-point.
    """
    if isinstance(layer, ScaledLayer) or why_unscalable(layer) is not None:
        return None
    block_size = selection.block_size_of(layer, name, type(layer))
    if block_size is None:
        return None
    check_weight(layer.weight, name)  # type: ignore[arg-type]
    groups = getattr(layer, "groups", 1)
    transposed = getattr(layer, "transposed", False)
    return BlockGrid.of(tuple(layer.weight.shape), block_size, groups, transposed)  # type: ignore[arg-type]
