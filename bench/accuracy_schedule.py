"""Gradual block pruning as `fxdbsr.Sparsifier` does it, with the choices that the comparison varies.

With trainable scales this is the Sparsifier's schedule, mask for mask (a test holds it to that); with frozen scales it
is gradual block-magnitude pruning; with `begin == end` it is one-shot pruning.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bench.accuracy_setting import Setting, load
from fxdbsr.bypass import Bypass
from fxdbsr.layers import blocked_layers
from fxdbsr.ranking import block_scores, lowest, lowest_of_each, scale_sizes
from fxdbsr.scales import block_costs, record_positions


class BlockSchedule:
    """Masks the lowest blocks of `model` along a cubic schedule until `setting.sparsity` of the MACs are zero.

    Args:
        model: prepared.
        setting: sparsity, begin, end, power.
        steps: of the whole training.
        scope: "global" ranks the blocks of all layers together, "layer" takes the same fraction of each layer.
    """

    def __init__(self, model: nn.Module, setting: Setting, steps: int, scope: str = "global") -> None:
        self.model, self.setting, self.steps, self.scope = model, setting, steps, scope
        self.layers = blocked_layers(model)
        self.start = scale_sizes(self.layers)
        record_positions(model, self.layers, load(setting.data, setting.draw).test_images[:1])
        self.costs = [cost.flatten() for cost in block_costs(self.layers, "macs", True)]
        self.positions = [
            cost / layer.grid.numel().flatten() for cost, layer in zip(self.costs, self.layers, strict=True)
        ]
        self.survives = Bypass(model, self.layers).survives
        self.interval, self.frozen = max(1, steps // 200), False

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        """After step number `step`, from 1."""
        start, stop = self.setting.begin * self.steps, self.setting.end * self.steps
        if self.frozen or step < start:
            return
        assert self.setting.sparsity is not None
        if step >= stop:
            self.frozen = True
            self.mask_lowest(self.setting.sparsity)
        elif (step - math.ceil(start)) % self.interval == 0:
            u = (step - start) / (stop - start)
            self.mask_lowest(self.setting.sparsity * (1 - (1 - u) ** 3))

    @torch.no_grad()
    def mask_lowest(self, sparsity: float) -> None:
        """Switch off the lowest blocks, and all others on."""
        for layer, off in zip(self.layers, self.lowest(sparsity), strict=True):
            layer.set_mask(~off.view(layer.grid.shape).to(layer.mask.device))

    def scores(self) -> list[Tensor]:
        """What each block is worth, before its cost counts."""
        return block_scores(self.layers, scales=self.start)

    def lowest(self, sparsity: float) -> list[Tensor]:
        """The blocks to switch off, bool for each layer."""
        if self.scope == "layer":
            return lowest_of_each(self.scores(), sparsity, self.survives)
        return self.ranked_lowest(self.scores(), sparsity)

    def ranked_lowest(self, scores: list[Tensor], sparsity: float) -> list[Tensor]:
        """The blocks to switch off by `scores` over all layers, each divided by its cost to the setting's power."""
        ranked = torch.cat([s / p**self.setting.power for s, p in zip(scores, self.positions, strict=True)])
        sizes, costs = [len(score) for score in scores], torch.cat(self.costs)
        return list(lowest(ranked, costs, sizes, sparsity * float(costs.sum()), self.survives).split_with_sizes(sizes))
