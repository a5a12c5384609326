"""F.batch_norm(x, mean, var, weight, bias) -> norm(x), where the tensors are those of one batch norm of the model.

Subclasses of batch norms that do more than normalise (timm's BatchNormAct2d: norm, dropout, activation) call the
function in their forward, into which the trace walks. As a module of torch's own the norm folds into its conv like
any other. Norms that use the batch's statistics stay.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from fxdbsr.graph import get_attribute, replace
from fxdbsr.passes.lowering import Lowering

KINDS: tuple[type[Any], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
TENSORS = ARGUMENTS[1:5]


def name_batchnorms(model: fx.GraphModule, lowering: Lowering) -> None:
    """Turn every such call into the call of a batch norm module, which stands beside the one it stands for."""
    for node in list(model.graph.nodes):
        arguments = dict(zip(ARGUMENTS, node.args, strict=False)) | node.kwargs
        owner = owner_of(node, arguments)
        if owner is None:
            continue
        norm = plain_norm(model.get_submodule(owner), float(arguments.get("eps", 1e-5)))
        name = f"{owner}_norm"
        while hasattr(model.get_submodule(owner.rpartition(".")[0]), name.rpartition(".")[2]):
            name += "_"
        model.add_submodule(name, norm)
        with model.graph.inserting_before(node):
            new = model.graph.call_module(name, (arguments["input"],))
        replace(node, new)


def owner_of(node: fx.Node, arguments: dict[str, Any]) -> str | None:
    """The name of the batch norm whose tensors `node` normalises with, or None."""
    model = node.graph.owning_module
    if node.target is not F.batch_norm or model is None or arguments.get("training", False) is not False:
        return None
    given = {name: arguments.get(name) for name in TENSORS}
    read = [tensor for tensor in given.values() if tensor is not None]
    if not all(isinstance(tensor, fx.Node) and tensor.op == "get_attr" for tensor in read):
        return None
    owner = str(given["running_mean"].target).rpartition(".")[0] if given["running_mean"] is not None else ""
    norm = model.get_submodule(owner)
    own = {name: None if tensor is None else get_attribute(model, str(tensor.target)) for name, tensor in given.items()}
    same = isinstance(norm, KINDS) and all(getattr(norm, name) is tensor for name, tensor in own.items())
    return owner if same else None


def plain_norm(norm: Any, eps: float) -> nn.Module:
    """The batch norm of torch's own with the tensors of `norm`, in eval mode."""
    kind = next(kind for kind in KINDS if isinstance(norm, kind))
    plain: nn.Module = kind(norm.num_features, eps, affine=False)
    for name in ("weight", "bias"):
        plain.register_parameter(name, getattr(norm, name))
    plain.affine = norm.weight is not None  # type: ignore[assignment]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        plain.register_buffer(name, getattr(norm, name))
    return plain.eval()
