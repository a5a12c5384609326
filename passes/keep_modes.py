"""What stays in training mode in evaluation, as a model's own `train` may ask for, written so that it stays so.

    batch norm (training) -> batch norm without running statistics
    dropout (training)    -> F.dropout(x, p, training=True)

A converted model has no `train` of its own: the next `.eval()` would change such modules. Running statistics are
not updated any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from fxdbsr.graph import called_module, replace
from fxdbsr.passes.lowering import Lowering

_DROPOUTS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Dropout: F.dropout,
    nn.Dropout1d: F.dropout1d,
    nn.Dropout2d: F.dropout2d,
    nn.Dropout3d: F.dropout3d,
    nn.AlphaDropout: F.alpha_dropout,
    nn.FeatureAlphaDropout: F.feature_alpha_dropout,
}


def keep_modes(model: fx.GraphModule, lowering: Lowering) -> None:
    """Write out the mode of modules that are in training mode.

    Raises:
        ValueError: a module that computes something else in training and is neither a batch norm nor a dropout.
    """
    for node in list(model.graph.nodes):
        module = called_module(node)
        if module is None or not module.training:
            continue
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = module.training = False
        elif type(module) in _DROPOUTS:
            with model.graph.inserting_before(node):
                arguments = (*node.args, module.p, True)
                replace(node, model.graph.call_function(_DROPOUTS[type(module)], arguments))
        elif isinstance(module, nn.RReLU | nn.RNNBase) or hasattr(module, "dropout"):
            kind = type(module).__name__
            raise ValueError(f"{node.target}: {kind} stays in training mode in evaluation, which convert cannot keep")
