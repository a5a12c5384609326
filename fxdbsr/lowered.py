"""From a prepared model to its lowered form: one graph, or the parts of a model that has several, through passes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from fxdbsr.graph import LoweredModule, TwoGraphModule, called_module, share_hooks, trace_eval
from fxdbsr.partial import as_part, lone_layers, parts_of, put_back
from fxdbsr.passes import Pass, run
from fxdbsr.passes.lowering import Lowering


def lowered(source: nn.Module, passes: Sequence[Pass], lowering: Lowering) -> nn.Module:
    """`source`, a model in eval mode, after `passes`: one graph, or graphs and layers in the places of its parts."""
    if not isinstance(source, fx.GraphModule | TwoGraphModule):
        try:
            source = trace_eval(source)
        except ValueError:
            return _lowered_in_parts(source, passes, lowering)
    return _lowered_graph(source, passes, lowering)


def _lowered_graph(source: nn.Module, passes: Sequence[Pass], lowering: Lowering) -> fx.GraphModule:
    traced = source.graph_module(False) if isinstance(source, TwoGraphModule) else source
    assert isinstance(traced, fx.GraphModule)
    run(passes, traced, lowering)
    lowered = LoweredModule(traced, traced.graph, type(traced).__name__).eval()
    share_hooks(source, lowered)
    return lowered


def _lowered_in_parts(source: nn.Module, passes: Sequence[Pass], lowering: Lowering) -> nn.Module:
    replaced: dict[nn.Module, nn.Module] = {}
    for name, part in parts_of(source).items():
        try:
            replaced[part] = as_part(part, _lowered_graph(part, passes, lowering.without_inputs()))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    alone = lone_layers(source)
    layers = {str(node.target): module for node in alone.graph.nodes if (module := called_module(node)) is not None}
    run(passes, alone, lowering.without_inputs())
    replaced |= {layer: alone.get_submodule(name) for name, layer in layers.items()}
    put_back(source, replaced)
    return source.eval()
