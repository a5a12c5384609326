"""How far a constant gradient moves a scale in a whole training, from the schedule of learning rates."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fxdbsr.optimizers import step_size
from fxdbsr.plan import Plan

LrSchedule: TypeAlias = LRScheduler | Sequence[float]


def total_step_size(
    optimizer: Optimizer, groups: Collection[int], schedule: LrSchedule | None, plan: Plan
) -> float | None:
    """The sum of `step_size` over the steps from begin to end, the least of `groups`; None where it is not known.

    Args:
        optimizer: whose learning rates the schedule sets; stays as it is, and so does the schedule.
        groups: positions of the groups that hold scales.
        schedule: stepped after each step of the optimizer; or the learning rate of every step; or None: the
            learning rates stay as they are, unless a schedule has left its `initial_lr` in the groups.
        plan: with its number of steps.

    Raises:
        TypeError, ValueError: `schedule` is neither, or tells fewer learning rates than there are steps.
    """
    _check_schedule(schedule, plan.steps)
    if plan.steps is None or not groups:
        return None
    if schedule is None and any("initial_lr" in group for group in optimizer.param_groups):
        return None
    sums = dict.fromkeys(groups, 0.0)
    try:
        for step, found in enumerate(_groups_of_each_step(optimizer, schedule, plan.steps), 1):
            if plan.is_inside(step):
                for group in groups:
                    sums[group] += step_size(optimizer, found[group])
    except (TypeError, ValueError):  # ReduceLROnPlateau wants a metric, OneCycleLR ends
        return None
    return min(sums.values())


def _check_schedule(schedule: Any, steps: int | None) -> None:
    if schedule is None or hasattr(schedule, "step"):
        return
    try:
        rates = [float(lr) for lr in schedule]
    except (TypeError, ValueError):
        raise TypeError(
            f"lr_schedule: expected a torch scheduler or the learning rate of every step, got {schedule!r:.80}"
        ) from None
    if len(rates) < (steps or 0):
        raise ValueError(f"lr_schedule: expected the learning rates of {steps} steps, got {len(rates)}")


def _groups_of_each_step(
    optimizer: Optimizer, schedule: LrSchedule | None, steps: int
) -> Iterator[list[dict[str, Any]]]:
    if schedule is None:
        yield from [optimizer.param_groups] * steps
    elif not isinstance(schedule, LRScheduler):
        for lr in schedule[:steps]:
            yield [group | {"lr": lr} for group in optimizer.param_groups]
    else:
        groups = _without_parameters(optimizer)
        stand_in = SGD([torch.zeros(1)], lr=0.0)
        stand_in.param_groups = groups
        twin = copy.deepcopy(schedule, {id(schedule.optimizer): stand_in})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the stand-in takes no steps
            for step in range(steps):
                if step:
                    twin.step()
                yield groups


def _without_parameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    plain = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return [copy.deepcopy(group) | {"params": [torch.zeros(1)]} for group in plain]
