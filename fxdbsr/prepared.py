"""From a model to its prepared form: traced, as a whole or in parts, and its layers scaled."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import fx, nn

from fxdbsr.blocks import BlockGrid
from fxdbsr.calls import FUNCTIONS, why_unscalable_call
from fxdbsr.config import BlockConfig, as_block_size
from fxdbsr.graph import called_module
from fxdbsr.nn.packed import PackedConv
from fxdbsr.nn.scaled import Blocked, plain_type, record_whole_forward, why_unscalable
from fxdbsr.partial import lone_layers, trace_parts
from fxdbsr.passes import PREPARE, run
from fxdbsr.passes.scale_functions import grid_of_call
from fxdbsr.passes.scale_layers import grid_of_layer
from fxdbsr.passes.selection import Selection
from fxdbsr.traced import TracedModule, TwoGraphModule, graph_modules, trace

TracerFunction: TypeAlias = Callable[..., TracedModule | TwoGraphModule]


def prepared(
    model: nn.Module,
    selection: Selection,
    concrete_args: dict[str, Any] | None,
    tracer: TracerFunction = trace,
) -> nn.Module:
    """`model`, traced by `tracer`, with the layers of `selection` scaled; see `fxdbsr.prepare`.

    Raises:
        TypeError, ValueError: see there.
    """
    traced = _traced(model, concrete_args, tracer)
    _check_names(traced, selection.config)
    graphs = list(graph_modules(traced))
    if not isinstance(traced, fx.GraphModule | TwoGraphModule):
        graphs.append(("", lone_layers(traced)))
    for prefix, part in graphs:
        _check_weights(part, selection.below(prefix))
    for prefix, part in graphs:
        run(PREPARE, part, selection.below(prefix))
    if not any(isinstance(module, Blocked) for module in traced.modules()):
        raise ValueError(f"{type(model).__name__} has no layer to block: {_why_nothing(traced, selection)}")
    if not isinstance(traced, fx.GraphModule | TwoGraphModule):
        record_whole_forward(traced)
    return traced


def _traced(model: nn.Module, concrete_args: Any, tracer: TracerFunction) -> nn.Module:
    """The graph of `model`, or `model` with graphs in the place of its largest parts that can be traced."""
    try:
        return tracer(model, concrete_args)
    except ValueError as error:
        if concrete_args is not None:
            raise
        model.untraced = {"": str(error)} | trace_parts(model, tracer)  # type: ignore[assignment]
        return model


def _check_names(model: nn.Module, config: BlockConfig) -> None:
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for name in config.by_name:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"by_name: the model has no layer {name!r}{hint}")


def _check_weights(model: fx.GraphModule, selection: Selection) -> None:
    for node in model.graph.nodes:
        layer = called_module(node)
        if layer is not None:
            grid_of_layer(layer, str(node.target), selection)
        grid_of_call(node, selection)


def _why_nothing(model: nn.Module, selection: Selection) -> str:
    reasons = [
        f"{name}: {why_unscalable(module)}"
        for name, module in model.named_modules()
        if plain_type(type(module)) is not None and why_unscalable(module)
    ]
    for _, graph_module in graph_modules(model):
        for node in graph_module.graph.nodes:
            if node.op == "call_function" and node.target in FUNCTIONS and why_unscalable_call(node):
                reasons.append(f"{node.name}: {why_unscalable_call(node)}")
    reasons += [f"{name}: converted already" for name, m in model.named_modules() if isinstance(m, PackedConv)]
    reasons += getattr(model, "untraced", {}).values()
    return "; ".join(reasons[:5]) or "none of the types, names and filters given selects one"


def check_block_size(model: nn.Module, block_size: Any) -> None:
    """Refuse a `block_size` other than the one that `model` was prepared with.

    Raises:
        ValueError: they differ; the message names the first layer that differs.
    """
    if block_size is None:
        return
    wanted = as_block_size(block_size)
    for name, module in model.named_modules():
        if isinstance(module, Blocked):
            grid = module.grid
            other = BlockGrid.of(grid.weight_shape, wanted, grid.groups, grid.transposed)
            if other != grid:
                raise ValueError(f"block_size: {name} was prepared with blocks of {grid.block_size}, got {block_size}")
