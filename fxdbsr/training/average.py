"""`Average`: an exponential moving average of a model's weights and statistics."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average:
    """A copy of `model` whose floating-point state follows the model's; masks and counters are the model's own.

    In the first steps the decay is less, so that the start is forgotten: `min(decay, (1 + n) / (10 + n))`.

    Args:
        model: stays as it is.
        decay: part of the average that each step keeps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.steps = copy.deepcopy(model).requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take a step towards `model`."""
        self.steps += 1
        keep = min(self.decay, (1 + self.steps) / (10 + self.steps))
        new = model.state_dict()
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                value.lerp_(new[name], 1 - keep)
            else:
                value.copy_(new[name])
