"""`Shrinking`: the way of `gamma` and `shrink`. The penalty `gamma * sum |s|` of the authors as a proximal step.

After each step of the optimizer `s <- clamp(s - t, 0, 1)`; in the form "clamp", whose scales are not bounded,
`s <- sign(s) * max(|s| - t, 0)`. Zeros are exact, and those blocks may come back. With `t = gamma * lr /
(1 - momentum)` for SGD and `gamma * lr` for Adam and AdamW the step is what the gradient of the penalty would be
worth in the long run, and the loss keeps its meaning. `shrink` sets the sum of all t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim import Optimizer

from fxdbsr.bypass import Bypass
from fxdbsr.layers import BlockedLayer
from fxdbsr.optimizers import step_size
from fxdbsr.plan import Plan
from fxdbsr.ranks import agreed, assign_, local, whole
from fxdbsr.travel import LrSchedule, total_step_size

LEAST = 1e-6


class Shrinking:
    """Brings scales nearer to zero after every step of `optimizer`.

    Attributes:
        travelled: how far that has moved a scale (of a layer of weight 1) until now; the least of the groups.

    Raises:
        ValueError: SGD with a momentum of 1 or more.
    """

    def __init__(
        self, layers: Sequence[BlockedLayer], optimizer: Optimizer, plan: Plan, bypass: Bypass, group: Any
    ) -> None:
        self.layers, self.optimizer, self.plan, self.bypass, self.group = layers, optimizer, plan, bypass, group
        self.travelled = 0.0
        groups = {id(p): i for i, held in enumerate(optimizer.param_groups) for p in held["params"]}
        self._groups = [groups.get(id(layer.scale)) if layer.scale.requires_grad else None for layer in layers]
        self.amounts()  # an optimizer that has none is refused now

    def after_step(self, step: int) -> None:
        """Shrink as the plan has it after step number `step`.

        Raises:
            ValueError: NaN or infinity in a scale.
        """
        if self.plan.is_inside(step):
            amounts = self.amounts()
            shrink_(self.layers, amounts)
            hold_cut_layers_(self.layers, amounts, self.bypass)
            self.travelled += min(self._amount(group) for group in self._groups if group is not None)

    def finalize(self) -> None:
        """Mask the zeros that the penalty has made.

        Raises:
            ValueError: NaN or infinity in a scale.
        """
        hold_cut_layers_(self.layers, self.amounts(), self.bypass)
        for layer in self.layers:
            layer.set_mask(agreed(layer.alive().cpu(), self.group, layer.scale.device))

    def amounts(self) -> list[float]:
        """How far a step shrinks the scales of each layer now; those that are not trained stay."""
        weights = [self.plan.cost_weights.get(layer.name, 1.0) for layer in self.layers]
        return [
            0.0 if group is None else weight * self._amount(group)
            for group, weight in zip(self._groups, weights, strict=True)
        ]

    def _amount(self, group: int) -> float:
        if self.plan.gamma is None:
            return self.plan.shrink_per_step()
        return self.plan.gamma * step_size(self.optimizer, self.optimizer.param_groups[group])

    def travel(self, schedule: LrSchedule | None) -> float | None:
        """What `travelled` will be in the end with that schedule of learning rates; None where it is not known."""
        if self.plan.gamma is None:
            return self.plan.shrink
        groups = {group for group in self._groups if group is not None}
        total = total_step_size(self.optimizer, groups, schedule, self.plan)
        return None if total is None else self.plan.gamma * total


def shrink_(layers: Sequence[BlockedLayer], amounts: Sequence[float]) -> None:
    """Bring the scales of each layer nearer to zero by its amount, in place; an amount of 0 leaves them alone."""
    for layer, amount in zip(layers, amounts, strict=True):
        scale = local(layer.scale)
        if amount and layer.form == "clamp":
            scale.copy_(F.softshrink(scale, amount))
        elif amount:
            scale.sub_(amount).clamp_(0, 1)


def hold_above_zero_(layers: Sequence[BlockedLayer]) -> None:
    """Keep the scales of the form "clamp" just above 0, in place: there a scale that passes 0 switches its block off.

    Where the mask alone says which blocks are zero, the loss would make more of them, up to the last of a layer.
    """
    for layer in layers:
        if layer.form == "clamp":
            local(layer.scale).clamp_(min=LEAST)


def hold_cut_layers_(layers: Sequence[BlockedLayer], amounts: Sequence[float], bypass: Bypass) -> None:
    """Where dead layers cut an output from an input, hold their heaviest block just above 0, in place.

    Raises:
        ValueError: NaN or infinity in a scale; the message names the layer.
    """
    finite, alive = _finite_and_alive(layers)
    if not all(finite):
        raise ValueError(f"{layers[finite.index(False)].name}: its scale holds NaN or infinity")
    dead: set[int] = set()
    for position, layer in enumerate(layers):
        if alive[position] or bypass.survives(dead | {position}):
            dead |= set() if alive[position] else {position}
            continue
        weight = whole(layer.weight).float()
        heaviest = layer.grid.block_sum(weight.square()).masked_fill(~layer.mask, -1).argmax()
        scale = whole(layer.scale).clone()
        scale.view(-1)[heaviest] = min(1.0, max(amounts[position], LEAST))
        assign_(layer.scale, scale)


def _finite_and_alive(layers: Sequence[BlockedLayer]) -> tuple[list[bool], list[bool]]:
    """For each layer whether all scales are finite, and whether any block is alive: gathered and read at once."""
    scales = [whole(layer.scale.detach()) for layer in layers]
    flags = [scale.isfinite().all() for scale in scales]
    flags += [layer.alive(scale).any() for layer, scale in zip(layers, scales, strict=True)]
    read = torch.stack(flags if len({f.device for f in flags}) == 1 else [f.cpu() for f in flags]).tolist()
    return read[: len(layers)], read[len(layers) :]
