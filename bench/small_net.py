"""A small net with everything that a converted model can hold, for tests and for benches of what is not speed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxdbsr
from bench.coverage import enliven, switch_off_half


class SmallNet(nn.Module):
    """Layers, functions, constants, splits and shuffles: images `[N, 3, H, W]` to `[N, 5]`."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(16)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 16, 1, bias=False)
        self.w = nn.Parameter(torch.randn(8, 16, 3, 3) / 12)
        self.up, self.last = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)
        self.register_buffer("shift", torch.ones(16, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, 3, H, W]` to `[N, 5]`."""
        x = F.relu(self.norm(self.stem(x))) + self.shift
        a, b = x.chunk(2, 1)
        x = torch.cat([a, F.leaky_relu(self.a(b) + b, 0.2)], 1)
        x = x.view(x.size(0), 2, 8, x.size(2), x.size(3)).transpose(1, 2).flatten(1, 2)
        x = F.conv2d(self.b(x), self.w, padding=1, stride=2) * torch.tensor(0.5)
        x = self.last(self.up(x))[..., 1:]
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def sparse(model: nn.Module, x: Tensor, block_size: Any = 4, seed: int = 0, **options: Any) -> nn.Module:
    """`model` prepared, in eval mode, a random half of its blocks off and its norms as after training."""
    generator = torch.Generator().manual_seed(seed)
    prepared = fxdbsr.prepare(model, block_size, **options)
    switch_off_half(prepared, generator)
    enliven(prepared, x, generator)
    return prepared.eval()
