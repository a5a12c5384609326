"""What bench/accuracy.py runs: lists of settings, in order of value.

`TUNED` holds what the plan "tune" found best for each arm, on other images and other seeds than those reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from bench.accuracy_training import Setting

SEEDS = (0, 1, 2, 3, 4)
TUNING_SEEDS = (100, 101)
TUNING_DRAW = 1
TUNED: dict[str, dict[str, Any]] = {}


def tuning(arm: str, sparsity: float | None, seed: int, **changes: Any) -> Setting:
    """A run on the images and seeds for tuning."""
    return Setting(arm, seed, sparsity, draw=TUNING_DRAW, **changes)


def tune() -> Iterator[Setting]:
    """Learning rate and weight decay of every arm."""
    arms = (("scaled", 0.9), ("gradual", 0.9), ("dense", None), ("slim", 0.9), ("channels", 0.9), ("once", 0.7))
    for lr, decay in product((0.2, 0.4), (5e-4, 1e-3, 2e-3, 4e-3)):
        for arm, sparsity in arms:
            yield tuning(arm, sparsity, TUNING_SEEDS[0], lr=lr, weight_decay=decay)


PLANS: dict[str, Callable[[], Iterator[Setting]]] = {plan.__name__: plan for plan in (tune,)}
