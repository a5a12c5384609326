"""The model as a networkx graph, its nodes with the figures of the report's rows.

Nodes are those of the traced eval graph and edges carry the data. Where a model cannot be traced the nodes
are its modules, and edges lead from a module to its children. `graph.graph["edges"]` says which.
"""

from __future__ import annotations

import copy

import networkx as nx
from torch import fx, nn

from fxdbsr.calls import FUNCTIONS, why_unscalable_call
from fxdbsr.graph import called_module
from fxdbsr.reporting.count import Tally
from fxdbsr.traced import TwoGraphModule, trace_eval


def eval_graph(model: nn.Module) -> fx.GraphModule | None:
    """What `model` runs in eval mode: its own graph, or one traced on a copy, or None where none can be."""
    if isinstance(model, TwoGraphModule):
        return model.graph_module(False)
    if isinstance(model, fx.GraphModule):
        return model
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    try:
        return trace_eval(copy.deepcopy(model, dict(tensors)))
    except Exception:
        return None


def function_calls(graph_module: fx.GraphModule | None, count: int) -> list[tuple[str, str]]:
    """(name, why it has no block scales or "") of the functional convs, in the order in which they run.

    Where the graph does not hold `count` of them the names are numbers, and the graph's reasons are unknown.
    """
    nodes = [] if graph_module is None else [n for n in graph_module.graph.nodes if _is_conv_call(n)]
    if len(nodes) != count:
        whole = "its weight is computed in the forward"
        reason = whole if graph_module is not None else "it is called in code that torch.fx cannot trace"
        return [(f"functional_{i}", reason) for i in range(count)]
    return [(node.name, why_unscalable_call(node) or "") for node in nodes]


def _is_conv_call(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in FUNCTIONS and FUNCTIONS[node.target][0] is not nn.Linear


def figures_graph(model: nn.Module, graph_module: fx.GraphModule | None, tally: Tally) -> nx.DiGraph[str]:
    """The graph of `model` with `LayerRow.to_dict()` on the nodes that have a row."""
    by_path = {
        name: tally.rows[tally.of_module[id(module)]]
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in tally.of_module
    }
    if graph_module is None:
        graph: nx.DiGraph[str] = nx.DiGraph(edges="children")
        for name, module in model.named_modules():
            figures = by_path[name].to_dict() if name in by_path else {"name": name}
            kind = type(module).__name__
            graph.add_node(name, op="module", target=kind, operation=kind, **figures)
            if name:
                graph.add_edge(name.rpartition(".")[0], name)
        return graph
    graph = nx.DiGraph(edges="data")
    functions = iter(tally.of_function)
    for node in graph_module.graph.nodes:
        row = by_path.get(str(node.target)) if node.op == "call_module" else None
        if _is_conv_call(node):
            row = next((tally.rows[i] for i in functions), None)
        figures = row.to_dict() if row is not None else {"name": node.name}
        graph.add_node(node.name, op=node.op, target=_target(node), operation=_operation(node), **figures)
        graph.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    return graph


def _target(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _operation(node: fx.Node) -> str:
    """The class of the module that `node` calls; else the function, method, input or attribute."""
    module = called_module(node)
    return _target(node) if module is None else type(module).__name__
