"""Max pools inside of the convs before them, on a GPU: what a conv computes is then never written but its maxima.

The graph stays an ordinary graph, conv and pool apart, and runs as one wherever something looks at it. Else a forward
made from a copy of it runs, in which a conv that a pool of 2 by 2 alone reads is called with that pool's side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.graph_module import _forward_from_src

from fxdbsr.graph import called_module
from fxdbsr.kernels.geometry import passes_maxima
from fxdbsr.nn.packed import PackedConv
from fxdbsr.nn.pool import side_of


def pools_of(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, int]]:
    """The call of a pool and its side, for each call of a conv that can take its maxima: nobody else sees the rest."""
    found = {}
    for node in graph.nodes:
        side = side_of(called_module(node))
        source = node.args[0] if side and len(node.args) == 1 and not node.kwargs else None
        if isinstance(source, fx.Node) and len(source.users) == 1 and _can_pool(source):
            found[source] = (node, side)
    return found


def _can_pool(node: fx.Node) -> bool:
    layer = called_module(node)
    if not isinstance(layer, PackedConv) or len(node.args) > 1 or node.kwargs:
        return False
    return (
        passes_maxima(layer.activation, layer.negative_slope)
        and layer.lift is None
        and layer.pad is None
        and len(layer.grid.kernel_size) == 2
    )


def pooled_forward(module: fx.GraphModule) -> Callable[..., Any] | None:
    """A forward of `module`, whose first argument it is, with pools inside of convs; None where there are none."""
    if not pools_of(module.graph):
        return None
    graph = fx.Graph(module)
    output = graph.graph_copy(module.graph, {})
    graph.output(output)
    for conv, (pool, side) in pools_of(graph).items():
        conv.kwargs = {"pool": side}
        pool.replace_all_uses_with(conv)
        graph.erase_node(pool)
    code = graph.python_code("self")
    return _forward_from_src(code.src, code.globals)
