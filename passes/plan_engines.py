"""packed conv on the engine of its shape -> packed conv on the engine of its shape, epilogue and input size.

Runs when epilogues are fused. What the calls of a conv look like is noted for the rule behind `backend="auto"`,
which weighs it on a GPU; the sizes are those of the example inputs, where there are any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxdbsr.graph import called_module
from fxdbsr.nn.packed import PackedConv
from fxdbsr.passes.lowering import Lowering


def plan_engines(model: fx.GraphModule, lowering: Lowering) -> None:
    """Note the residual and the input size of every packed conv, and choose anew where the rule asks for them."""
    layers = {node: layer for node in model.graph.nodes if isinstance(layer := called_module(node), PackedConv)}
    sizes = seen_sizes(model, {str(node.target): layer for node, layer in layers.items()}, lowering)
    for node, layer in layers.items():
        layer.adds_residual = len(node.args) > 1
        layer.input_size = sizes.get(str(node.target))
        if layer.backend == "auto" and layer.values.is_cuda:
            layer.choose_engine()


def seen_sizes(
    model: fx.GraphModule, layers: Mapping[str, PackedConv], lowering: Lowering
) -> dict[str, tuple[int, int, int]]:
    """Images, height and width of the first input of every 2-d conv in a forward of the example inputs.

    Raises:
        ValueError: the model's forward fails on them.
    """
    if lowering.tune or not any(isinstance(value, torch.Tensor) for value in lowering.example_inputs):
        return {}  # tuning measures whatever the rule says
    seen: dict[str, tuple[int, int, int]] = {}

    def note(name: str, x: Any) -> None:
        if x.dim() == 4:
            seen.setdefault(name, (x.shape[0], x.shape[2], x.shape[3]))

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        with torch.inference_mode():
            model(*lowering.example_inputs)
    except Exception as error:
        raise ValueError(f"example_inputs: the model's forward fails on them: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return seen
