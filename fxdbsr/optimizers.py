"""What a sparsifier asks of an optimizer: which one it is, whether it holds the scales, how far it steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import SGD, Optimizer

from fxdbsr.layers import BlockedLayer


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of Accelerate and Lightning, which skip its steps as they see fit."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def check_holds_scales(optimizer: Any, layers: Sequence[BlockedLayer]) -> None:
    """Refuse what is no optimizer, and one without the trainable scales of `layers`.

    Raises:
        TypeError, ValueError: it is.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch optimizer, got {type(optimizer).__name__}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    absent = [layer.name for layer in layers if layer.scale.requires_grad and id(layer.scale) not in held]
    if absent:
        raise ValueError(
            f"optimizer: it lacks {len(absent)} of {len(layers)} scales, the first of {absent[0]}: make it "
            "from fxdbsr.param_groups(model, ...) or model.parameters() after fxdbsr.prepare (and fully_shard)"
        )


def step_size(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """How far a constant gradient of 1 moves a parameter of `group` in a step, in the long run.

    `lr * (1 - dampening) / (1 - momentum)` with SGD; `lr`, without that reading, with Adam, AdamW and others.

    Raises:
        ValueError: SGD with a momentum of 1 or more, where steps grow for ever.
    """
    lr = float(group["lr"])
    if not isinstance(optimizer, SGD):
        return lr
    momentum = float(group["momentum"])
    if momentum >= 1:
        raise ValueError(f"optimizer: expected a momentum below 1, got {momentum}")
    return lr * (1 - float(group["dampening"])) / (1 - momentum)
