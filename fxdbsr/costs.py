"""`Costs`: what the blocks of a model cost, alike on every rank, and which part of that is zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxdbsr.layers import BlockedLayer
from fxdbsr.ranks import agreed
from fxdbsr.scales import block_costs


class Costs:
    """Answers what each block costs; counted when it is first asked for, since MACs may not be known before.

    Args:
        layers: of a prepared model.
        weights: factors on the costs of whole layers, by name; 1 where a layer is not named.
        measured: MACs are those that `record_positions` has recorded.
        group: process group whose ranks shall count alike, or None.
    """

    def __init__(
        self, layers: Sequence[BlockedLayer], weights: Mapping[str, float], measured: bool, group: Any = None
    ) -> None:
        self.layers, self.weights, self.measured, self.group = layers, weights, measured, group
        self._found: dict[str, list[Tensor]] = {}

    def of(self, kind: str) -> list[Tensor]:
        """`[rows, columns]` float64 on the CPU for each layer; `kind` is "blocks", "params" or "macs".

        Raises:
            ValueError: MACs that are not known yet.
        """
        if kind not in self._found:
            costs = block_costs(self.layers, kind, self.measured)
            factors = [self.weights.get(layer.name, 1.0) for layer in self.layers]
            flat = torch.cat([c.flatten() * factor for c, factor in zip(costs, factors, strict=True)])
            flat = agreed(flat, self.group, self.layers[0].scale.device)
            parts = flat.split_with_sizes([c.numel() for c in costs])
            self._found[kind] = [part.view(c.shape) for part, c in zip(parts, costs, strict=True)]
        return self._found[kind]

    def are_known(self, kind: str) -> bool:
        """True where `of(kind)` has an answer."""
        if kind != "macs" or self.measured or kind in self._found:
            return True
        return all(user.positions for layer in self.layers for user in layer.users)

    def sparsity(self, kind: str) -> float:
        """Fraction of the cost of all layers that is zero now, by mask or by scale."""
        costs = self.of(kind)
        kept = sum(float(c[layer.alive().cpu()].sum()) for c, layer in zip(costs, self.layers, strict=True))
        return 1 - kept / sum(float(c.sum()) for c in costs)
