"""The scales of a prepared model as the training loop sees them: their names, their price, their group.

What a block costs is counted in one of three ways (`block_costs`): 1 ("blocks"), its weights ("params"), or
its multiply-accumulates for one sample ("macs": its weights times the positions at which they are multiplied,
over all calls of all layers that share the weight). Each layer records its positions in its first forward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxdbsr.layers import BlockedLayer, blocked_layers
from fxdbsr.nn.scaled import Blocked
from fxdbsr.ranks import whole
from fxdbsr.traced import unwrap

COSTS = ("blocks", "params", "macs")
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def block_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every scale `[rows, columns]` of a prepared model by the name of its layer.

    Raises:
        ValueError: the model was not prepared. TypeError: it is no module.
    """
    return {layer.name: layer.scale for layer in blocked_layers(model)}


def penalty(model: nn.Module, weight: str = "blocks", example_inputs: Any = None) -> Tensor:
    """Sum of |scale| over the blocks that are not masked, each times its cost; a loss takes gamma times it.

    Args:
        model: a prepared model.
        weight: "blocks", "params" or "macs": what a block counts (see this module's head).
        example_inputs: a tensor or a tuple of the model's arguments, whose sizes count for "macs".

    Returns:
        A float32 tensor without axes, differentiable in the scales.

    Raises:
        ValueError: an unknown `weight`; MACs asked for before any forward and without `example_inputs`; a
            model that was not prepared. TypeError: `model` is no module.
    """
    layers = blocked_layers(model)
    if example_inputs is not None:
        record_positions(model, layers, example_inputs)
    costs = block_costs(layers, weight, example_inputs is not None)
    device = layers[0].scale.device
    terms = [
        (whole(layer.scale).float().abs() * (cost.float().to(layer.scale.device) * layer.mask)).sum().to(device)
        for layer, cost in zip(layers, costs, strict=True)
    ]
    return torch.stack(terms).sum()


def param_groups(model: nn.Module, weight_decay: float, **defaults: Any) -> list[dict[str, Any]]:
    """Every trainable parameter once, in at most three groups for an optimizer: weights, rest, scales.

    Weight decay is for weights: biases, parameters of norms, other vectors and scales have none.

    Args:
        model: a prepared model, or any other (then there is no group of scales).
        weight_decay: of the weights.
        defaults: further options of all groups, like `lr`.

    Raises:
        ValueError: a negative or NaN `weight_decay`, no trainable parameter, or `params` among the `defaults`.
        TypeError: `model` is no module, or `weight_decay` no number.
    """
    root = unwrap(model)
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, int | float):
        raise TypeError(f"weight_decay: expected a number, got {weight_decay!r}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay: expected a number that is not negative, got {weight_decay!r}")
    if "params" in defaults:
        raise ValueError("defaults: the parameters come from the model, got params as well")
    prepared = any(isinstance(module, Blocked) for module in root.modules())
    scales = {id(layer.scale) for layer in blocked_layers(model)} if prepared else set()
    plain = {
        id(parameter)
        for module in root.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, _NORMS) or name.endswith("bias") or parameter.dim() < 2
    }
    groups: tuple[list[nn.Parameter], ...] = ([], [], [])
    for parameter in root.parameters():
        if parameter.requires_grad:
            groups[2 if id(parameter) in scales else id(parameter) in plain].append(parameter)
    if not any(groups):
        raise ValueError(f"{type(root).__name__} has no trainable parameter")
    decays = (weight_decay, 0.0, 0.0)
    return [
        {"params": parameters, "weight_decay": decay} | defaults
        for parameters, decay in zip(groups, decays, strict=True)
        if parameters
    ]


def block_costs(layers: Sequence[BlockedLayer], of: str, measured: bool = False) -> list[Tensor]:
    """What each block of `layers` costs, `[rows, columns]` float64 on the CPU for each layer.

    Args:
        layers: of a prepared model.
        of: "blocks", "params" or "macs".
        measured: MACs are those that `record_positions` has recorded: a layer that its inputs did not reach
            (an auxiliary head of training) costs none. Otherwise it is an error that a layer's are not known.

    Raises:
        ValueError: an unknown `of`; MACs that are not known.
    """
    check_cost(of)
    if of == "blocks":
        return [torch.ones(layer.grid.shape, dtype=torch.float64) for layer in layers]
    factors = [1 if of == "params" else positions_of(layer, measured) for layer in layers]
    return [layer.grid.numel().double() * n for layer, n in zip(layers, factors, strict=True)]


def check_cost(of: str, where: str = "weight") -> None:
    """Refuse what is not in `COSTS`.

    Raises:
        ValueError: it is not.
    """
    if of not in COSTS:
        raise ValueError(f"{where}: expected one of {COSTS}, got {of!r}")


def positions_of(layer: BlockedLayer, may_be_none: bool = False) -> int:
    """How often one forward multiplies each weight of `layer` for one sample.

    Raises:
        ValueError: no user of the weight has recorded it, unless it `may_be_none`.
    """
    recorded = [n for user in layer.users for n in user.positions]
    if not recorded and not may_be_none:
        raise ValueError(
            f"{layer.name}: its MACs are not known before its first forward: run the model once on a batch "
            "(uncompiled), or pass example_inputs"
        )
    return sum(recorded)


def record_positions(model: nn.Module, layers: Sequence[BlockedLayer], example_inputs: Any) -> None:
    """Let every layer record its positions anew from one forward of `example_inputs` in eval mode.

    Raises:
        ValueError: the forward fails; the positions are then as before.
    """
    root = unwrap(model)
    inputs = example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)
    before = [(user, user.positions) for layer in layers for user in layer.users]
    for user, _ in before:
        user.positions = []
    try:
        with evaluation(root), torch.no_grad():
            root(*inputs)
    except Exception as error:
        for user, positions in before:
            user.positions = positions
        raise ValueError(f"example_inputs: the forward of {type(root).__name__} fails on them: {error}") from error


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_fraction(value: Any, where: str, below_one: bool = False) -> float:
    """`value` as a float in [0, 1], or [0, 1) where it is `below_one`.

    Raises:
        ValueError: it is outside; TypeError: it is no number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{where}: expected a number, got {value!r}")
    if not 0 <= value <= 1 or (below_one and value == 1) or math.isnan(value):
        raise ValueError(f"{where}: expected a fraction in [0, 1{')' if below_one else ']'}, got {value!r}")
    return float(value)
