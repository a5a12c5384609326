"""F.batch_norm(x, mean, var, gamma, beta) -> batch norm(x), where all of them are tensors of the model.

Norms with an activation of their own (timm's) are written so, behind a check of the number of axes; the module
makes the same check. torchvision's frozen batch norm becomes an ordinary one with the same numbers.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxdbsr.graph import called_module, get_attribute, replace
from fxdbsr.nn.scaled import plain_type
from fxdbsr.passes.lowering import Lowering
from fxdbsr.tracer import is_frozen_norm

_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_KINDS: dict[int, Any] = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def name_batchnorms(model: fx.GraphModule, lowering: Lowering) -> None:
    """Let functional batch norms with running statistics, behind a conv or a check of their axes, be modules."""
    for name, module in {str(n.target): called_module(n) for n in model.graph.nodes}.items():
        if module is not None and is_frozen_norm(module):
            buffers = [getattr(module, key) for key in _NAMES[1:5]]
            model.set_submodule(name, batch_norm(nn.BatchNorm2d, buffers, float(module.eps)))  # type: ignore[arg-type]
    for node in list(model.graph.nodes):
        if node.op != "call_function" or node.target is not F.batch_norm:
            continue
        given = dict(zip(_NAMES, node.args, strict=False)) | node.kwargs
        x, tensors = given["input"], [given.get(name) for name in _NAMES[1:5]]
        check = next((user for user in x.users if user.args[1:] == ("ndim",) and user.target is getattr), None)
        rank = _checked_rank(check) if check is not None else _rank_of_conv(x)
        stored = all(t is None or (isinstance(t, fx.Node) and t.op == "get_attr") for t in tensors)
        if rank not in _KINDS or not stored or tensors[0] is None or given.get("training", False) is not False:
            continue
        if check is not None:
            _erase_with_readers(check)
        name = f"{str(tensors[0].target).rpartition('.')[0].replace('.', '_')}_norm"
        values = [None if t is None else get_attribute(model, str(t.target)) for t in tensors]
        model.add_submodule(name, batch_norm(_KINDS[rank], values, given.get("eps", 1e-5)))
        with model.graph.inserting_before(node):
            replace(node, model.graph.call_module(name, (x,)))


def batch_norm(kind: Any, tensors: list[Any], eps: float) -> nn.Module:
    """The norm of class `kind` with `tensors`: mean, variance, factors or None, shifts or None."""
    mean, var, gamma, beta = tensors
    norm: nn.Module = kind(len(mean), eps, affine=gamma is not None, device="meta")
    norm.running_mean, norm.running_var = mean, var
    norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device=mean.device)
    if gamma is not None:
        beta = torch.zeros_like(gamma) if beta is None else beta
        norm.weight, norm.bias = (t if isinstance(t, nn.Parameter) else nn.Parameter(t) for t in (gamma, beta))
    return norm.eval()


def _checked_rank(ndim: fx.Node) -> int | None:
    """4, where all that reads `ndim` is `torch._assert(ndim == 4, ...)`."""
    (equal,) = ndim.users if len(ndim.users) == 1 else (None,)
    if equal is None or equal.target is not operator.eq or any(u.target is not torch._assert for u in equal.users):
        return None
    return equal.args[1] if isinstance(equal.args[1], int) else None


def _rank_of_conv(x: fx.Node) -> int | None:
    conv = called_module(x)
    return conv.weight.dim() if conv is not None and plain_type(type(conv)) is not None else None  # type: ignore


def _erase_with_readers(node: fx.Node) -> None:
    for user in list(node.users):
        _erase_with_readers(user)
    node.graph.erase_node(node)
