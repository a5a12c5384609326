"""`Sparsifier`: rides on an optimizer and brings the blocks of a prepared model to zero while it trains.

Two modes:

* target: the scaled gradual schedule. From `begin` to `end` of the steps the part of the cost that is zero
  follows `target * (1 - (1 - u)^3)`, u from 0 to 1 (Zhu and Gupta, To prune, or not to prune, 2017). Every
  `interval` steps all blocks are ranked by `s^2 * sum(W^2) / numel` and the lowest are masked; masked ones
  may return until the mask freezes at `end`; the rest of the steps fine-tunes. For MACs the score is
  divided by the square root of the MACs of one weight: without, the early layers, whose weights are used at
  most positions, keep all their blocks and the late layers lose theirs.
* gamma: the penalty `gamma * sum |s|` of the method's authors, as a proximal step after each step of the
  optimizer: `s <- clamp(s - gamma * lr / (1 - momentum), 0, 1)` with SGD, `gamma * lr` with others. Its zeros
  are exact, and those blocks may come back until `finalize()`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from fxdbsr.bypass import Bypass
from fxdbsr.layers import BlockedLayer, blocked_layers
from fxdbsr.ranking import block_scores, lowest
from fxdbsr.scales import block_costs, check_cost, check_fraction, record_positions

_CONFIGURED = ("target", "of", "steps", "gamma", "begin", "end", "interval")


class Sparsifier:
    """Takes a step of sparsification after every step of `optimizer`.

    Steps that a GradScaler skips do not count. All ranks of a DistributedDataParallel model choose alike.

    Args:
        model: prepared; also inside torch.compile or DistributedDataParallel.
        optimizer: any torch optimizer that holds the scales.
        target: fraction in [0, 1) of the cost of all blocked layers that shall be zero in the end.
        of: the cost: "blocks", "params" (weights) or "macs" (multiply-accumulates).
        steps: steps of the optimizer in the whole training; required with `target`.
        gamma: strength of the penalty, not negative. Exactly one of `target` and `gamma` is given.
        example_inputs: a tensor or a tuple of the model's arguments, for the MACs; else the first batch.
        begin, end: fractions of `steps` between which the target is approached; the mask freezes at `end`.
        interval: steps between two rankings; `max(1, steps // 200)` by default.

    Raises:
        ValueError, TypeError: an argument that is missing or out of its range, a model that was not prepared,
            an optimizer without the scales, a target that cannot be met because convs on the only path from
            input to output keep a block (the message has the figure that can).
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
        example_inputs: Any = None,
        begin: float = 0.1,
        end: float = 0.67,
        interval: int | None = None,
    ) -> None:
        if (target is None) == (gamma is None):
            raise ValueError(f"expected exactly one of target and gamma, got target={target!r}, gamma={gamma!r}")
        self.target = None if target is None else check_fraction(target, "target", below_one=True)
        self.gamma = None if gamma is None else _strength(gamma)
        check_cost(of, "of")
        if steps is None and target is not None:
            raise ValueError("steps: the number of optimizer steps of the whole training is required with target")
        self.of, self.steps = of, None if steps is None else _count(steps, "steps")
        self.begin, self.end = check_fraction(begin, "begin"), check_fraction(end, "end")
        if begin > end:
            raise ValueError(f"begin: expected at most end = {end}, got {begin}")
        self.interval = max(1, (steps or 0) // 200) if interval is None else _count(interval, "interval")
        self.model, self.optimizer = model, optimizer
        self.layers = blocked_layers(model)
        _check_optimizer(optimizer, self.layers)
        self.step, self.frozen = 0, False
        self._bypass = Bypass(model, self.layers)
        self._costs: dict[str, list[Tensor]] = {}
        self._measured = example_inputs is not None
        if self._measured:
            record_positions(model, self.layers, example_inputs)
        if self.target is not None and self._known(of):
            self._check_reachable()
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def remove(self) -> None:
        """Leave the optimizer; masks and scales stay as they are."""
        self._hook.remove()

    def sparsity(self, of: str | None = None) -> float:
        """Fraction of the cost of all blocked layers that is zero now, by mask or by scale.

        Args:
            of: "blocks", "params" or "macs"; by default what the sparsifier was made with.
        """
        costs = self._costs_of(self.of if of is None else of)
        kept = sum(float(c[layer.alive().cpu()].sum()) for c, layer in zip(costs, self.layers, strict=True))
        return 1 - kept / sum(float(c.sum()) for c in costs)

    @torch.no_grad()
    def finalize(self) -> None:
        """Freeze the mask now: at the target, or at the zeros that the penalty has made; once."""
        if self.frozen:
            return
        if self.target is not None:
            self._mask_lowest(self.target)
        else:
            self._check_finite()
            self._hold_cut_layers()
            for layer in self.layers:
                layer.set_mask(layer.alive())
        self.frozen = True

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        skipped = getattr(optimizer, "found_inf", None)  # set where a GradScaler leaves skipping to a fused step
        if self.frozen or (skipped is not None and bool(skipped)):
            return
        self.step += 1
        if self.gamma is not None:
            self._shrink()
            return
        assert self.target is not None
        assert self.steps is not None
        start, stop = self.begin * self.steps, self.end * self.steps
        if self.step == 1 and not self._costs:
            self._check_reachable()
        if self.step >= stop:
            self.finalize()
        elif self.step >= start and (self.step - math.ceil(start)) % self.interval == 0:
            u = (self.step - start) / (stop - start)
            self._mask_lowest(self.target * (1 - (1 - u) ** 3))

    def _mask_lowest(self, sparsity: float) -> None:
        off = self._lowest(sparsity)
        sizes = [c.numel() for c in self._costs_of(self.of)]
        for layer, lost in zip(self.layers, off.split_with_sizes(sizes), strict=True):
            layer.set_mask(~lost.view(layer.grid.shape))

    def _lowest(self, sparsity: float) -> Tensor:
        """The blocks to mask for `sparsity`, bool over the blocks of all layers."""
        costs = torch.cat([c.flatten() for c in self._costs_of(self.of)])
        sizes = [layer.mask.numel() for layer in self.layers]
        try:
            scores = torch.cat(block_scores(self.layers))
        except ValueError as error:
            raise ValueError(f"step {self.step}: {error}") from error
        if self.of == "macs":
            weights = torch.cat([layer.grid.numel().flatten() for layer in self.layers])
            scores = scores / (costs / weights).clamp_min(1).sqrt()
        return lowest(scores, costs, sizes, sparsity * float(costs.sum()), self._bypass.survives)

    def _check_reachable(self) -> None:
        """Refuse a target that leaves no block to a layer that needs one."""
        assert self.target is not None
        costs = torch.cat([c.flatten() for c in self._costs_of(self.of)])
        reachable = float(costs[self._lowest(1.0)].sum() / costs.sum())
        if self.target > reachable + max(0.005, float(costs.max() / costs.sum()) / 2):
            raise ValueError(
                f"target: {self.target} of the {self.of} cannot be zero, at most {reachable:.4f}: every conv "
                "without a bypass keeps one block"
            )

    def _shrink(self) -> None:
        """The proximal step, with the learning rate and momentum of each scale's own group."""
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for layer in self.layers:
            if id(layer.scale) in groups and layer.scale.requires_grad:
                layer.scale.sub_(self._travel(groups[id(layer.scale)])).clamp_(0, 1)
        if self.step % self.interval == 0:
            self._check_finite()
        self._hold_cut_layers()

    def _travel(self, group: dict[str, Any]) -> float:
        assert self.gamma is not None
        momentum = float(group["momentum"]) if isinstance(self.optimizer, SGD) else 0.0
        return self.gamma * float(group["lr"]) / (1 - momentum)

    def _hold_cut_layers(self) -> None:
        """Where dead layers cut an output from an input, hold their heaviest block just above 0."""
        live = torch.stack([layer.alive().any().cpu() for layer in self.layers]).tolist()
        dead: set[int] = set()
        for position, (layer, alive) in enumerate(zip(self.layers, live, strict=True)):
            if alive or self._bypass.survives(dead | {position}):
                dead |= set() if alive else {position}
                continue
            size = layer.grid.block_sum(layer.weight.float().square()).masked_fill(~layer.mask, -1)
            layer.scale.view(-1)[size.argmax()] = self._smallest(layer.scale)

    def _smallest(self, scale: Tensor) -> float:
        group = next((g for g in self.optimizer.param_groups if any(p is scale for p in g["params"])), None)
        return min(1.0, max(self._travel(group) if group else 0.0, 1e-6))

    def _check_finite(self) -> None:
        bad = [layer.name for layer in self.layers if not bool(layer.scale.isfinite().all())]
        if bad:
            raise ValueError(f"step {self.step}: {bad[0]}: its scale holds NaN or infinity")

    def _known(self, of: str) -> bool:
        return of != "macs" or self._measured or all(user.positions for layer in self.layers for user in layer.users)

    def _costs_of(self, of: str) -> list[Tensor]:
        if of not in self._costs:
            self._costs[of] = block_costs(self.layers, of, self._measured)
        return self._costs[of]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the states of model and optimizer: plain numbers and strings."""
        return {
            "step": self.step,
            "frozen": self.frozen,
            "measured": self._measured,
            "positions": {layer.name: [user.positions for user in layer.users] for layer in self.layers},
        } | {key: getattr(self, key) for key in _CONFIGURED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with its schedule; load the model's and optimizer's states too.

        Raises:
            ValueError: `state` is not of a sparsifier, of one in the other mode, or of another model.
        """
        missing = sorted({"step", "frozen", "measured", "positions", *_CONFIGURED} - set(state))
        if missing:
            raise ValueError(f"state: expected the state of a Sparsifier, got one without {missing}")
        if (state["target"] is None) != (self.target is None):
            raise ValueError("state: one of the sparsifiers has a target, the other a gamma")
        if sorted(state["positions"]) != sorted(layer.name for layer in self.layers):
            raise ValueError("state: the names of its layers are not those of this model")
        for key in ("step", "frozen", *_CONFIGURED):
            setattr(self, key, state[key])
        for layer in self.layers:
            for user, positions in zip(layer.users, state["positions"][layer.name], strict=True):
                user.positions[:] = positions
        self._measured = state["measured"]
        self._costs.clear()


def _strength(gamma: Any) -> float:
    if isinstance(gamma, bool) or not isinstance(gamma, int | float):
        raise TypeError(f"gamma: expected a number, got {gamma!r}")
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma: expected a finite number that is not negative, got {gamma!r}")
    return float(gamma)


def _count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: expected an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{where}: expected at least 1, got {value}")
    return value


def _check_optimizer(optimizer: Any, layers: list[BlockedLayer]) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch optimizer, got {type(optimizer).__name__}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    absent = [layer.name for layer in layers if layer.scale.requires_grad and id(layer.scale) not in held]
    if absent:
        raise ValueError(
            f"optimizer: it lacks {len(absent)} of {len(layers)} scales, the first of {absent[0]}: make it "
            "from fxdbsr.param_groups(model, ...) or model.parameters() after fxdbsr.prepare"
        )
