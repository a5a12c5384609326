"""From a prepared model to its lowered form: one graph, or the parts of a model that has several, through passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import fx, nn

from fxdbsr.graph import called_module
from fxdbsr.partial import as_part, lone_layers, parts_of, put_back
from fxdbsr.passes import Pass, run
from fxdbsr.passes.lowering import Lowering
from fxdbsr.passes.plan_engines import plan_sizes
from fxdbsr.passes.tune_engines import tune_engines
from fxdbsr.traced import GraphModule, TwoGraphModule, share_hooks, trace_eval

Finish: TypeAlias = Callable[[fx.GraphModule], fx.GraphModule]


def lowered(source: nn.Module, passes: Sequence[Pass], lowering: Lowering, finish: Finish) -> nn.Module:
    """`source`, a model in eval mode, after `passes`: one graph module, or such in the places of its parts.

    Args:
        finish: the module to return for a graph module that went through the passes.
    """
    if not isinstance(source, fx.GraphModule | TwoGraphModule):
        try:
            source = trace_eval(source)
        except ValueError:
            return _in_parts(source, passes, lowering, finish)
    return _graph(source, passes, lowering, finish)


def _graph(source: nn.Module, passes: Sequence[Pass], lowering: Lowering, finish: Finish) -> fx.GraphModule:
    traced = source.graph_module(False) if isinstance(source, TwoGraphModule) else source
    assert isinstance(traced, fx.GraphModule)
    run(passes, traced, lowering)
    found = finish(traced)
    share_hooks(source, found)
    return found


def _in_parts(source: nn.Module, passes: Sequence[Pass], lowering: Lowering, finish: Finish) -> nn.Module:
    replaced: dict[nn.Module, nn.Module] = {}
    for name, part in parts_of(source).items():
        try:
            replaced[part] = as_part(part, _graph(part, passes, lowering.without_inputs(), finish))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    alone = lone_layers(source)
    layers = {str(node.target): module for node in alone.graph.nodes if (module := called_module(node)) is not None}
    run(passes, alone, lowering.without_inputs())
    replaced |= {layer: alone.get_submodule(name) for name, layer in layers.items()}
    put_back(source, replaced)
    source.eval()
    if tune_engines in passes:
        plan_sizes(source, lowering)
        tune_engines(source, lowering)
    return source


def dense_module(model: fx.GraphModule) -> fx.GraphModule:
    """An ordinary graph module over what the graph of `model` reads, to be trained on."""
    return GraphModule(model, model.graph, type(model).__name__).eval().requires_grad_()
