"""identity(x) -> x: `nn.Identity`, and in eval mode dropout and stochastic depth.

They stand between a conv and its norm, activation or residual add, which are fused only where they are neighbours.
What drops in evaluation, too, stays.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from fxdbsr.graph import called_module
from fxdbsr.passes.lowering import Lowering

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_FUNCTIONS: dict[Any, int] = {F.dropout: 2, F.dropout1d: 2, F.dropout2d: 2, F.dropout3d: 2, F.alpha_dropout: 2}


def drop_identities(model: fx.GraphModule, lowering: Lowering) -> None:
    """Let the readers of what an identity gives read what it reads."""
    for node in list(model.graph.nodes):
        if is_identity(node):
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)


def is_identity(node: fx.Node) -> bool:
    """True where `node` gives its only tensor as it is."""
    if len(node.all_input_nodes) != 1 or not node.args or node.args[0] is not node.all_input_nodes[0]:
        return False
    module = called_module(node)
    if module is not None:
        if module._forward_hooks or module._forward_pre_hooks:
            return False
        return type(module) is nn.Identity or (type(module) in _DROPOUTS and not module.training)
    if node.op != "call_function":
        return False
    position = _FUNCTIONS.get(node.target)
    if getattr(node.target, "__name__", "") == "stochastic_depth" and _home(node).startswith("torchvision."):
        position = 3
    if position is None:
        return False
    training = node.args[position] if len(node.args) > position else node.kwargs.get("training", True)
    return training is False


def _home(node: fx.Node) -> str:
    return str(getattr(node.target, "__module__", ""))
