"""Weights that other tools compute from a mask become plain parameters: weight_orig * weight_mask -> weight.

`torch.nn.utils.prune` computes them in a hook before each forward, `torch.ao.pruning` in a parametrization; a model
may come with either, before or after the tool's own "remove" or "squash". Other parametrizations (weight norm,
orthogonal) are constants in eval mode, too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod


@torch.no_grad()
def bake_weights(modules: Iterable[nn.Module]) -> None:
    """Make every pruned or parametrized tensor of `modules`, in eval mode, a parameter of its present value.

    In place; no tensor is written to, so that what else holds one keeps its value.
    """
    for module in list(modules):
        if parametrize.is_parametrized(module):
            bake_parametrizations(module)
        bake_pruning(module)


def bake_parametrizations(module: nn.Module) -> None:
    """Make the parametrized tensors of `module` plain parameters and its class what it was."""
    values = {name: getattr(module, name) for name in module.parametrizations}  # type: ignore[union-attr]
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, value in values.items():
        module.register_parameter(name, parameter(value))


def bake_pruning(module: nn.Module) -> None:
    """Make the tensors of `module` that `torch.nn.utils.prune` masks plain parameters, without its hooks."""
    hooks: OrderedDict[int, Any] = OrderedDict()
    for key, hook in module._forward_pre_hooks.items():
        if not isinstance(hook, BasePruningMethod):
            hooks[key] = hook
            continue
        name = hook._tensor_name
        value = hook.apply_mask(module)
        del module._parameters[f"{name}_orig"], module._buffers[f"{name}_mask"]
        module.__dict__.pop(name, None)
        module.register_parameter(name, parameter(value))
    if len(hooks) < len(module._forward_pre_hooks):
        module._forward_pre_hooks = hooks


def parameter(value: Tensor) -> nn.Parameter:
    """A parameter with a copy of `value`."""
    return nn.Parameter(value.detach().clone())
