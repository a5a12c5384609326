"""`Masking`: the way of `target`. The blocks of least worth go; those that come to be worth more return."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxdbsr.bypass import Bypass
from fxdbsr.costs import Costs
from fxdbsr.layers import BlockedLayer
from fxdbsr.plan import Plan
from fxdbsr.ranking import block_scores, lowest
from fxdbsr.ranks import agreed


class Masking:
    """Ranks all blocks by their score and masks the lowest until a fraction of the cost is zero.

    The score is `s0^2 * sum(W^2) / numel(block)` with the scales `s0` of the start: those of now have trained in blocks
    that were on and stood still in the others. For MACs it is divided by the MACs of one weight to the power
    `cost_power`: without, the early layers, whose weights are used at most positions, keep all their blocks and the
    late layers lose theirs.

    Args:
        layers: all of the model.
        costs, plan, bypass: of the sparsifier.
        start: `scale_sizes` of the layers when training began.
    """

    def __init__(
        self, layers: Sequence[BlockedLayer], costs: Costs, plan: Plan, bypass: Bypass, start: Sequence[Tensor]
    ) -> None:
        self.layers, self.costs, self.plan, self.bypass, self.start = layers, costs, plan, bypass, start
        self._checked = False

    def after_step(self, step: int) -> None:
        """Mask as the plan has it after step number `step`.

        Raises:
            ValueError: NaN in a score; at the first step also MACs that are not known, a target out of reach.
        """
        if not self._checked:
            self.check_reachable()
        if self.plan.is_due(step) and not self.plan.is_over(step):
            self.mask(self.plan.sparsity(step))

    def finalize(self) -> None:
        """Mask to the target."""
        assert self.plan.target is not None
        self.mask(self.plan.target)

    def mask(self, sparsity: float) -> None:
        """Mask the blocks of lowest score until `sparsity` of the cost is zero, and switch on all others."""
        off = agreed(self.lowest(sparsity), self.costs.group, self.layers[0].scale.device)
        for layer, lost in zip(self.layers, self._split(off), strict=True):
            layer.set_mask(~lost)

    def lowest(self, sparsity: float) -> Tensor:
        """The blocks to mask for `sparsity`, bool over the blocks of all layers, on the CPU.

        Where those of highest score, kept in layers that have no bypass, are too dear for it, the cheapest are kept.
        """
        costs, scores = self._flat_costs(), self.scores()
        amount = sparsity * float(costs.sum())
        off = self._lowest(scores, amount)
        if amount - float(costs[off].sum()) > self._tolerance(costs):
            off = self._lowest(scores.masked_fill(~self._lowest(-costs, float(costs.sum())), torch.inf), amount)
        return off

    def _lowest(self, scores: Tensor, amount: float) -> Tensor:
        sizes = [layer.mask.numel() for layer in self.layers]
        return lowest(scores, self._flat_costs(), sizes, amount, self.bypass.survives)

    @staticmethod
    def _tolerance(costs: Tensor) -> float:
        """By which cost the target may be missed."""
        return max(0.005 * float(costs.sum()), float(costs.max()) / 2)

    def scores(self) -> Tensor:
        """What each block is worth, over the blocks of all layers, on the CPU."""
        scores = torch.cat(block_scores(self.layers, scales=self.start))
        if self.plan.of == "macs" and self.plan.cost_power:
            weights = torch.cat([layer.grid.numel().flatten() for layer in self.layers])
            scores = scores / (self._flat_costs() / weights).clamp_min(1).pow(self.plan.cost_power)
        return scores

    def check_reachable(self) -> None:
        """Refuse a target that leaves no block to a layer that needs one.

        Raises:
            ValueError: it does; the message says how much can be zero, and which layers keep a block. NaN in a score.
        """
        assert self.plan.target is not None
        self.scores()
        costs = self._flat_costs()
        total = float(costs.sum())
        off = self._lowest(-costs, total)
        reachable = float(costs[off].sum()) / total
        if self.plan.target > reachable + self._tolerance(costs) / total:
            kept = [float(part.sum()) for part in self._split(costs.masked_fill(off, 0))]
            dearest = max(range(len(kept)), key=kept.__getitem__)
            raise ValueError(
                f"target: {self.plan.target} of the {self.plan.of} cannot be zero, at most {reachable:.4f}: "
                f"{sum(k > 0 for k in kept)} of {len(kept)} layers have no bypass and keep a block, the dearest "
                f"{self.layers[dearest].name} ({kept[dearest] / total:.4f}); ask for less, or for "
                "smaller blocks"
            )
        self._checked = True

    def _split(self, blocks: Tensor) -> list[Tensor]:
        """What there is for each block of all layers, by layer, `[rows, columns]` each."""
        parts = blocks.split_with_sizes([layer.mask.numel() for layer in self.layers])
        return [part.view(layer.grid.shape) for part, layer in zip(parts, self.layers, strict=True)]

    def _flat_costs(self) -> Tensor:
        return torch.cat([c.flatten() for c in self.costs.of(self.plan.of)])
