"""F.max_pool2d(x, ...), F.avg_pool2d(x, ...) -> the module of the same name, where sizes are constants.

The module is what the CPU engine's steps and convs that pool look for. Pools that give indices stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxdbsr.graph import replace
from fxdbsr.passes.lowering import Lowering

_MAX = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_MEAN = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_POOLS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.max_pool2d: (nn.MaxPool2d, _MAX),
    torch.max_pool2d: (nn.MaxPool2d, _MAX),
    F.avg_pool2d: (nn.AvgPool2d, _MEAN),
}


def name_pools(model: fx.GraphModule, lowering: Lowering) -> None:
    """Let max and mean pools over windows of constant size, called as functions, be modules."""
    for node in list(model.graph.nodes):
        if node.op != "call_function" or node.target not in _POOLS:
            continue
        kind, names = _POOLS[node.target]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        x = given.pop("input")
        stride = given.pop("stride", None)
        given |= {} if stride in (None, [], ()) else {"stride": stride}
        if node.all_input_nodes != [x]:
            continue  # a size is computed
        name = node.name
        while hasattr(model, name):
            name += "_"
        model.add_submodule(name, kind(**given))
        with model.graph.inserting_before(node):
            replace(node, model.graph.call_module(name, (x,)))
