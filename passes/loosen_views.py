"""x.view(shape) -> x.reshape(shape): the same values, also where `x` lies in memory with its channels last.

Packed convs write their outputs with channels last, of which `view(N, -1)` before a classifier cannot be a view.
"""

from __future__ import annotations

import torch
from torch import fx

from fxdbsr.graph import writes_in_place
from fxdbsr.passes.lowering import Lowering

LOOSE = {"view": "reshape", "view_as": "reshape_as"}


def loosen_views(model: fx.GraphModule, lowering: Lowering) -> None:
    """Turn views into reshapes, but for those through which one value may be written and another read."""
    for node in model.graph.nodes:
        if node.op != "call_method" or node.target not in LOOSE or node.kwargs:
            continue
        base, *shape = node.args
        if not isinstance(base, fx.Node) or any(isinstance(size, torch.dtype) for size in shape):
            continue
        if len(base.users) > 1 and any(writes_in_place(user) for user in (*base.users, *node.users)):
            continue
        node.target = LOOSE[node.target]
