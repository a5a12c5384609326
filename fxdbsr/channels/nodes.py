"""Questions about nodes that come before their channels: which count, which may change, which share memory."""

from __future__ import annotations

from torch import fx

from fxdbsr.channels.layers import CHANNELWISE, is_layer
from fxdbsr.channels.table import ALIASES, rule_of
from fxdbsr.graph import called_module, writes_in_place


def live_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Nodes that an output or a write in place depends on, in order."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in live or node.is_impure() or writes_in_place(node):
            live |= {node, *node.all_input_nodes}
    return [node for node in graph.nodes if node in live]


def frozen_modules(nodes: list[fx.Node]) -> dict[int, str]:
    """Why a module's tensors may not change, as a sentence, by its id, for those that are called by `nodes`."""
    frozen: dict[int, str] = {}
    for node in nodes:
        module = called_module(node)
        if node.op == "get_attr":
            assert node.graph.owning_module is not None
            owner = node.graph.owning_module.get_submodule(str(node.target).rpartition(".")[0])
            frozen[id(owner)] = "the forward reads its parameters"
        if module is None:
            continue
        frozen.update({id(m): f"{node.target} uses it inside" for m in module.modules() if m is not module})
        if module._forward_hooks or module._forward_pre_hooks:
            frozen[id(module)] = "it has forward hooks"
        elif node.kwargs or len(node.args) != 1:
            frozen[id(module)] = "it is called with more than one argument"
    return frozen


def overwritten(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes whose memory is written in place while somebody still reads what they held before."""
    order = {node: place for place, node in enumerate(nodes)}
    family: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        family[node] = [node]
        for source in _shares_memory(node):
            if family[source] is not family[node]:
                joined = family[source] + family[node]
                family.update(dict.fromkeys(joined, joined))
    found: set[fx.Node] = set()
    for writer in filter(writes_in_place, nodes):
        for member in family[writer]:
            last = max((order.get(user, -1) for user in member.users), default=-1)
            if order[member] < order[writer] < last:
                found.update(family[writer])
    return found


def _shares_memory(node: fx.Node) -> list[fx.Node]:
    """Arguments of `node` whose memory its result may lie in; all of them where no rule is known."""
    module = called_module(node)
    rule = rule_of(node, module)
    if rule is None:
        known = is_layer(module) or type(module) in CHANNELWISE
        return [] if known else node.all_input_nodes
    return node.all_input_nodes[:1] if rule in ALIASES or writes_in_place(node) else []
