"""A picture of every blocked layer's mask, one square a block: filled where the block is kept."""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn

from fxdbsr.layers import blocked_layers


def save_masks(model: nn.Module, path: Path) -> None:
    """Write the block masks of a prepared model as a PNG; rows of a mask are output channels, columns input.

    Raises:
        ImportError: without matplotlib. ValueError: the model was not prepared.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = blocked_layers(model)
    columns = math.ceil(math.sqrt(2 * len(layers)))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(1.6 * columns, 1.9 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for position in range(rows * columns):
        axes = figure.add_subplot(rows, columns, position + 1)
        if position >= len(layers):
            axes.set_axis_off()
            continue
        layer = layers[position]
        kept = layer.alive().cpu()
        axes.imshow(kept.float().numpy(), cmap="Blues", vmin=0, vmax=1.25, interpolation="nearest")
        axes.set_title(f"{layer.name}\n{int(kept.sum())} of {kept.numel()} kept", fontsize=7)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.supxlabel("input channels, in blocks", fontsize=8)
    figure.supylabel("output channels, in blocks", fontsize=8)
    figure.savefig(path)
