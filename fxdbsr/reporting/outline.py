"""What of a traced graph is drawn: its layers, and the operations where data from several layers meet.

A ResNet-50 has 177 nodes, of which 54 are layers and 16 are adds; norms, activations and reshapes are told in the
label of the node that they follow.
"""

from __future__ import annotations

from typing import Any

import networkx as nx

from fxdbsr.reporting.columns import figure, percent


def outline(graph: nx.DiGraph[str]) -> nx.DiGraph[str]:
    """`graph` without its constants, and without nodes that have one source and no figures.

    Every node keeps its attributes and gets `follows`, the names of the operations that were left out behind
    it. Takes time linear in nodes and edges; nodes of a data graph have to come in an order in which they can run.
    """
    small: nx.DiGraph[str] = nx.DiGraph(**graph.graph)
    stands_for: dict[str, str] = {}
    for name, figures in graph.nodes(data=True):
        sources = list(dict.fromkeys(stands_for[s] for s in graph.predecessors(name) if s in stands_for))
        if graph.graph["edges"] == "data" and not _drawn(figures, len(sources)):
            if sources:
                stands_for[name] = sources[0]
                small.nodes[sources[0]]["follows"].append(figures["operation"])
            continue
        stands_for[name] = name
        small.add_node(name, **figures, follows=[])
        small.add_edges_from((source, name) for source in sources)
    return small


def _drawn(figures: dict[str, Any], sources: int) -> bool:
    return "kind" in figures or figures["op"] in ("placeholder", "output") or sources > 1


def places(graph: nx.DiGraph[str]) -> dict[str, tuple[int, int]]:
    """(row, lane) of every node of an outline, no two alike.

    Where edges carry data, a node's row is one below the lowest of its sources; it takes the lane of its
    leftmost source, or the next lane that is free in its row. A tree of modules is written as an indented list.
    Linear in nodes and edges, so that it serves where Graphviz takes minutes.
    """
    found: dict[str, tuple[int, int]] = {}
    if graph.graph["edges"] == "children":
        for row, name in enumerate(graph):
            parents = [found[parent][1] for parent in graph.predecessors(name)]
            found[name] = row, 1 + max(parents, default=-1)
        return found
    taken: dict[int, set[int]] = {}
    next_free: dict[int, int] = {}
    for name in graph:
        sources = [found[source] for source in graph.predecessors(name)]
        row = 1 + max((row for row, _ in sources), default=-1)
        lane = min((lane for _, lane in sources), default=0)
        if lane in taken.setdefault(row, set()):
            lane = next_free[row]
        taken[row].add(lane)
        next_free[row] = max(next_free.get(row, 0), lane + 1)
        found[name] = row, lane
    return found


def label(figures: dict[str, Any]) -> list[str]:
    """Lines of text for a node of an outline: what it is and what follows; names of modules, MACs of layers."""
    what = [figures["kind"] if "kind" in figures else figures["operation"], *figures["follows"]]
    words = " + ".join(what if len(what) <= 3 else [*what[:2], f"{len(what) - 2} more"])
    if "kind" in figures:
        return [figures["name"], words, macs(figures)]
    return [figures["name"], words] if figures["op"] == "module" and figures["name"] else [words]


def macs(figures: dict[str, Any]) -> str:
    """The MACs of a layer, with what was saved where something was."""
    if figures["macs"] == figures["macs_dense"]:
        return f"{figure(figures['macs'])} MACs"
    dense, kept = figure(figures["macs_dense"]), figure(figures["macs"])
    return f"{dense} to {kept} MACs, {percent(figures['saved'])} saved"


def share(graph: nx.DiGraph[str]) -> dict[str, float]:
    """Dense MACs of every layer over those of the largest one, by node."""
    dense = {name: figures["macs_dense"] for name, figures in graph.nodes(data=True) if "kind" in figures}
    most = max(dense.values(), default=0) or 1
    return {name: value / most for name, value in dense.items()}
