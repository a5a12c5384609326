"""`Sparsifier`: rides on an optimizer and brings the blocks of a prepared model to zero while it trains.

Three ways:

* `target`: the scaled gradual schedule (`fxdbsr.masking`). Until `begin` scales stand still: the model trains as the
  dense one. From `begin` to `end` of the steps the part of the cost that is zero rises to the target; every
  `interval` steps all blocks are ranked and the lowest masked; masked ones may return until the mask freezes at
  `end`; the rest of the steps fine-tunes. On a model of form "mask", whose scales stay one, this is gradual block
  pruning.
* `gamma`: the penalty `gamma * sum |s|` of the method's authors, as a proximal step after each step of the
  optimizer (`fxdbsr.shrinking`).
* `shrink`: the same, by how far the penalty moves a scale in the whole training, whatever the learning rate.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxdbsr.bypass import Bypass
from fxdbsr.costs import Costs
from fxdbsr.layers import BlockedLayer, blocked_layers
from fxdbsr.masking import Masking
from fxdbsr.optimizers import check_holds_scales, unwrapped
from fxdbsr.plan import Plan
from fxdbsr.ranking import scale_sizes
from fxdbsr.ranks import group_of, reshard
from fxdbsr.scales import check_cost, record_positions
from fxdbsr.shrinking import Shrinking, hold_above_zero_
from fxdbsr.still import StillScales
from fxdbsr.travel import LrSchedule


class Sparsifier:
    """Takes a step of sparsification after every step of `optimizer`.

    Exactly one of `target`, `gamma` and `shrink` is given. Steps count as the optimizer takes them: once in several
    batches where gradients are accumulated; those that a GradScaler skips do not count. On several processes every
    rank makes one, after the model is wrapped by DistributedDataParallel or fully_shard.

    Args:
        model: prepared; also inside torch.compile, DistributedDataParallel or fully_shard.
        optimizer: any torch optimizer that holds the scales; also as Accelerate and Lightning wrap it.
        target: fraction in [0, 1) of the cost of all blocked layers that shall be zero in the end; met to half the
            cost of a block.
        of: the cost: "blocks", "params" (weights) or "macs" (multiply-accumulates).
        steps: steps of the optimizer in the whole training; required with `target` and `shrink`.
        gamma: strength of the penalty, not negative.
        shrink: how far the penalty moves each scale in all, not negative; they start at 1.
        example_inputs: a tensor or a tuple of the model's arguments, for the MACs; else the first batch.
        begin, end: fractions of `steps` between which blocks go; the mask freezes at `end`. By default 0.3 (or half
            of an `end` below 0.6) and 0.67 with `target`, else 0 and 1. With `target` scales learn from `begin` on.
        interval: steps between two rankings; `max(1, steps // 200)` by default.
        cost_weights: factors on the cost of layers, and on how far their scales shrink, by name; 1 by default.
        cost_power: with `target` and `of="macs"`: blocks are ranked by what they are worth divided by the MACs of
            one weight to this power; 0 ranks by worth alone.
        lr_schedule: with `gamma`: a torch scheduler that is stepped after each step of the optimizer, or the
            learning rate of every step (then `steps` is their number by default), to know `travel` in advance.
        process_group: ranks that shall mask alike, where the model's wrapper does not tell.

    Attributes:
        step: steps taken.
        frozen: True once the mask is final.
        plan: the options, with their defaults filled in.
        travel: how far the penalty moves scales in all, `gamma * sum(lr) / (1 - momentum)` with SGD, or None where
            that is not known. It brings a scale to zero by itself where it passes 1.

    Raises:
        ValueError, TypeError: an argument that is missing or out of its range, a model that was not prepared,
            an optimizer without the scales, a target that cannot be met because convs on the only path from
            input to output keep a block (the message has the figure that can).

    Warns:
        UserWarning: `travel` is known and less than 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        target: float | None = None,
        of: str = "blocks",
        steps: int | None = None,
        gamma: float | None = None,
        shrink: float | None = None,
        example_inputs: Any = None,
        begin: float | None = None,
        end: float | None = None,
        interval: int | None = None,
        cost_weights: Mapping[str, float] | None = None,
        cost_power: float = 0.5,
        lr_schedule: LrSchedule | None = None,
        process_group: Any = None,
    ) -> None:
        if steps is None and isinstance(lr_schedule, Sequence):
            steps = len(lr_schedule)
        self.plan = Plan.checked(
            target=target, gamma=gamma, shrink=shrink, of=of, steps=steps, begin=begin, end=end, interval=interval,
            cost_weights=cost_weights, cost_power=cost_power,
        )  # fmt: skip
        optimizer = unwrapped(optimizer)
        reshard(model)
        self.model, self.optimizer, self.layers = model, optimizer, blocked_layers(model)
        _check_weights(self.plan, self.layers)
        check_holds_scales(optimizer, self.layers)
        if target is None and not any(layer.scale.requires_grad for layer in self.layers):
            raise ValueError("gamma, shrink: there is no trainable scale; a model of form 'mask' takes a target")
        self.step, self.frozen = 0, False
        self._group = group_of(model, self.layers[0].scale) if process_group is None else process_group
        if example_inputs is not None:
            record_positions(model, self.layers, example_inputs)
            reshard(model)
        self._bypass = Bypass(model, self.layers)
        self._costs = Costs(self.layers, self.plan.cost_weights, example_inputs is not None, self._group)
        self._start = scale_sizes(self.layers)
        self._way = self._make_way()
        if isinstance(self._way, Masking) and self._costs.are_known(of):
            self._way.check_reachable()
        self.travel = self._way.travel(lr_schedule) if isinstance(self._way, Shrinking) else None
        self._still = StillScales(optimizer, self.layers)
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )
        if self.travel is not None and self.travel < 1:
            warnings.warn(
                f"the penalty moves scales by {self.travel:.3g} in all of {self.plan.steps} steps; below 1 it brings "
                "none to zero by itself: raise gamma, the steps or the learning rate, or set shrink instead",
                stacklevel=2,
            )

    def __repr__(self) -> str:
        plan = self.plan
        way = {"target": plan.target, "gamma": plan.gamma, "shrink": plan.shrink}
        asked = ", ".join(f"{name}={value}" for name, value in way.items() if value is not None)
        steps = "" if plan.steps is None else f" of {plan.steps}"
        frozen = ", frozen" if self.frozen else ""
        return f"Sparsifier({asked}, of={plan.of!r}, {len(self.layers)} layers, step {self.step}{steps}{frozen})"

    def _make_way(self) -> Masking | Shrinking:
        if self.plan.target is not None:
            return Masking(self.layers, self._costs, self.plan, self._bypass, self._start)
        return Shrinking(self.layers, self.optimizer, self.plan, self._bypass, self._group)

    @property
    def travelled(self) -> float:
        """How far the penalty has moved scales (of layers of weight 1) until now."""
        return self._way.travelled if isinstance(self._way, Shrinking) else 0.0

    def remove(self) -> None:
        """Leave the optimizer; masks and scales stay as they are."""
        for hook in self._hooks:
            hook.remove()

    def sparsity(self, of: str | None = None) -> float:
        """Fraction of the cost of all blocked layers that is zero now, by mask or by scale.

        Args:
            of: "blocks", "params" or "macs"; by default what the sparsifier was made with.

        Raises:
            ValueError: another `of`; MACs before the first forward, where no `example_inputs` were given.
        """
        of = self.plan.of if of is None else of
        check_cost(of, "of")
        return self._costs.sparsity(of)

    @torch.no_grad()
    def finalize(self) -> None:
        """Freeze the mask now: at the target, or at the zeros that the penalty has made; once."""
        if not self.frozen:
            self._way.finalize()
            hold_above_zero_(self.layers)
            self.frozen = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.plan.target is not None and not self.frozen and self.plan.is_before(self.step + 1):
            self._still.note()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._still.undo()
        if self.frozen or self.plan.target is not None:
            hold_above_zero_(self.layers)
        skipped = getattr(optimizer, "found_inf", None)  # set where a GradScaler leaves skipping to a fused step
        if self.frozen or (skipped is not None and bool(skipped)):
            return
        self.step += 1
        try:
            self._way.after_step(self.step)
            if self.plan.is_over(self.step):
                self.finalize()
        except ValueError as error:
            raise ValueError(f"step {self.step}: {error}") from error

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the states of model and optimizer: dicts of numbers, strings, tensors."""
        return {
            "step": self.step,
            "frozen": self.frozen,
            "travelled": self.travelled,
            "measured": self._costs.measured,
            "positions": {layer.name: [user.positions for user in layer.users] for layer in self.layers},
            "start": {layer.name: size for layer, size in zip(self.layers, self._start, strict=True)},
            "plan": self.plan.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, with its plan; load the model's and optimizer's states too.

        Raises:
            ValueError: `state` is not of a sparsifier, of one that goes another way, or of another model.
            TypeError: it is no dict.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected the state of a Sparsifier, a dict, got {state!r}")
        missing = sorted(set(_STATE) - set(state))
        if missing:
            raise ValueError(f"state: expected the state of a Sparsifier, got one without {missing}")
        for key, kind in _STATE.items():
            if not isinstance(state[key], kind):
                raise ValueError(f"state: expected {key} of a Sparsifier, got {state[key]!r:.80}")
        if set(state["plan"]) != set(self.plan.to_dict()):
            raise ValueError(f"state: expected the plan of a Sparsifier, got {state['plan']!r:.80}")
        plan = Plan.checked(**state["plan"])
        if (plan.target is None) != (self.plan.target is None):
            raise ValueError("state: one of the sparsifiers has a target, the other has none")
        if sorted(state["positions"]) != sorted(layer.name for layer in self.layers):
            raise ValueError("state: the names of its layers are not those of this model")
        start = [_start_of(layer, state["start"]) for layer in self.layers]
        recorded = [_positions_of(layer, state["positions"][layer.name]) for layer in self.layers]
        for layer, found in zip(self.layers, recorded, strict=True):
            for user, positions in zip(layer.users, found, strict=True):
                user.positions[:] = positions
        self._start = start
        self.step, self.frozen, self.plan = state["step"], state["frozen"], plan
        self._costs = Costs(self.layers, plan.cost_weights, state["measured"], self._group)
        self._way = self._make_way()
        if isinstance(self._way, Shrinking):
            self._way.travelled = state["travelled"]


_STATE: dict[str, Any] = {
    "step": int, "frozen": bool, "travelled": float | int, "measured": bool, "positions": Mapping, "start": Mapping,
    "plan": Mapping,
}  # fmt: skip


def _positions_of(layer: BlockedLayer, found: Any) -> list[list[int]]:
    lists = found if isinstance(found, list) else []
    sound = all(isinstance(one, list) and all(isinstance(n, int) for n in one) for one in lists)
    if not sound or len(lists) != len(layer.users):
        raise ValueError(f"state: expected positions of {len(layer.users)} users of {layer.name}, got {found!r:.80}")
    return lists


def _start_of(layer: BlockedLayer, start: Mapping[str, Any]) -> Tensor:
    found = start.get(layer.name)
    if not isinstance(found, Tensor) or found.shape != layer.grid.shape:
        raise ValueError(f"state: expected first scales {layer.grid.shape} of {layer.name}, got {found!r:.80}")
    return found.float().cpu()


def _check_weights(plan: Plan, layers: list[BlockedLayer]) -> None:
    unknown = sorted(set(plan.cost_weights) - {layer.name for layer in layers})
    if unknown:
        raise ValueError(f"cost_weights: no blocked layer is named {unknown[0]!r}; one is {layers[0].name!r}")
