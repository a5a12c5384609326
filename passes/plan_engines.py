"""packed conv on the engine of its shape -> packed conv on the engine of its shape, epilogue and input size.

Runs when epilogues are fused. What the calls of a conv look like is noted for the rule behind `backend="auto"`; the
sizes are those of the example inputs, where there are any, else those of a forward before conversion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxdbsr.graph import called_module
from fxdbsr.network.pooled import pools_of
from fxdbsr.nn.packed import PackedConv
from fxdbsr.passes.lowering import Lowering


def plan_engines(model: fx.GraphModule, lowering: Lowering) -> None:
    """Note residual, pool and input size of every packed conv, and choose anew where the rule asks for them."""
    pools = pools_of(model.graph)
    for node in model.graph.nodes:
        layer = called_module(node)
        if isinstance(layer, PackedConv):
            layer.adds_residual = len(node.args) > 1
            layer.pool = pools[node][1] if node in pools else 1
            if layer.backend == "auto" and layer.values.is_cuda:
                layer.choose_engine()
    plan_sizes(model, lowering)


def plan_sizes(model: nn.Module, lowering: Lowering) -> None:
    """Note the input sizes of a forward of the example inputs, and choose anew; tuning measures whatever they say.

    Raises:
        ValueError: the model's forward fails on them.
    """
    if lowering.tune or not lowering.example_inputs:
        return
    for layer, arguments in seen_inputs(model, lowering.example_inputs).items():
        size = layer.size_of(arguments[0])
        if size != layer.input_size:
            layer.input_size = size
            layer.choose_engine()


def seen_inputs(model: nn.Module, inputs: tuple[Any, ...]) -> dict[PackedConv, tuple[Any, ...]]:
    """The arguments of the first call of each packed conv in a forward of `inputs`.

    Raises:
        ValueError: the model's forward fails on them.
    """
    seen: dict[PackedConv, tuple[Any, ...]] = {}

    def note(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(layer, PackedConv)
        seen.setdefault(layer, arguments)

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, PackedConv)]
    try:
        with torch.inference_mode():
            model(*inputs)
    except Exception as error:
        raise ValueError(f"example_inputs: the model's forward fails on them: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return seen
