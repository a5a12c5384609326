"""What options of a lead do to the gradients of bench/accuracy.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.accuracy_setting import Setting
from fxdbsr.layers import BlockedLayer, blocked_layers
from fxdbsr.nn.scaled import ScaledLayer

LEAST = 1e-3


def change_gradients(optimizer: Optimizer, model: nn.Module, setting: Setting) -> None:
    """Let `optimizer` change the gradients of `model` before every step as the options of `setting` say.

    * own_norms [0]: every scale's gradient, times this, is divided by the squared norm of its block.
    * clip [0]: all gradients together are scaled down to a norm of this.
    """
    rate, norm = setting.option("own_norms", 0.0), setting.option("clip", 0.0)
    layers = blocked_layers(model) if rate else []

    def before_step(*_: Any) -> None:
        divide_by_own_norms_(layers, rate)
        if norm:
            nn.utils.clip_grad_norm_(model.parameters(), norm)

    if rate or norm:
        optimizer.register_step_pre_hook(before_step)


@torch.no_grad()
def divide_by_own_norms_(layers: Sequence[BlockedLayer], rate: float) -> None:
    """Multiply the gradient of every scale by `rate / sum(W^2)` over its block.

    Where the scale is 1, its step then moves the block along itself `rate` times as far as the step of the weights
    does, whatever the block's size. Blocks of less than a thousandth of their layer's mean count as that much.
    """
    for layer in layers:
        if layer.scale.grad is not None:
            energy = layer.grid.block_sum(layer.weight.square())
            layer.scale.grad.mul_(rate / energy.clamp(min=LEAST * float(energy.mean())))


def let_masked_blocks_learn(model: nn.Module, part: float) -> None:
    """Give weights of masked blocks `part` of the gradient that they would have if they were on; outputs stay."""

    def learning(layer: ScaledLayer, own: Callable[[], Tensor]) -> Callable[[bool], Tensor]:
        def scaled_weight(for_conv: bool = False) -> Tensor:
            masked = part * layer.grid.scale(layer.weight, (~layer.mask).to(layer.scale.dtype))
            return own() + (masked - masked.detach())

        return scaled_weight

    for layer in [module for module in model.modules() if isinstance(module, ScaledLayer)]:
        setattr(layer, "scaled_weight", learning(layer, layer.scaled_weight))  # noqa: B010
