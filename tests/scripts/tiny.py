"""A net that trains in a second, for `fxdbsr train --model tiny:net` from this folder."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def net(num_classes: int) -> nn.Module:
    """Two convs, batch norms and a dropout for images of any size."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


class Breaking(nn.Module):
    """As `net`, until its logits turn NaN in the forward number 25 of training."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = net(num_classes)
        self.breaker = _Breaker()

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, num_classes]`."""
        y: Tensor = self.breaker(self.body(x))
        return y


class _Breaker(nn.Module):
    is_leaf_in_trace = True

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """`x`, or NaN."""
        self.calls += self.training
        return x * torch.nan if self.calls == 25 else x


def three() -> nn.Module:
    """A net for three classes, whatever is asked."""
    return net(3)
