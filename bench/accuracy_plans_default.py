"""Plans of bench/accuracy.py that the default rests on: when blocks go, how fast scales learn, what else may be set."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from bench.accuracy_setting import Setting
from bench.accuracy_tuned import HALF, LATER, NARROW, STRONG

WHEN = (300, 308)
PAIR = ("scaled", "gradual")


def when() -> Iterator[Setting]:
    """When blocks go, ours and gradual pruning: seeds on images of their own, beside dense nets."""
    for seed in range(*WHEN):
        yield Setting("dense", seed, draw=seed, **STRONG)
        for begin, end in ((0.1, 0.67), (0.3, 0.67), (0.1, 0.35), (0.1, 0.9), (0.4, 0.8)):
            yield Setting("scaled", seed, 0.5, draw=seed, begin=begin, end=end, **STRONG)
    for seed in range(WHEN[0], WHEN[0] + 5):
        for sparsity, begin in product((0.7, 0.9), (0.1, 0.3)):
            yield from (Setting(arm, seed, sparsity, draw=seed, begin=begin, **STRONG) for arm in PAIR)
        yield Setting("scaled", seed, 0.9, draw=seed, begin=0.1, end=0.9, **STRONG)
    for seed in range(WHEN[0], WHEN[0] + 4):
        yield from (Setting("gradual", seed, 0.5, draw=seed, begin=begin, **STRONG) for begin in (0.1, 0.3))
    for seed in range(WHEN[0], WHEN[0] + 3):
        yield Setting("once_layer", seed, 0.9, draw=seed, end=0.4, **STRONG)


def rate() -> Iterator[Setting]:
    """Scales at 0.3 of the rate: images of their own, then those that are reported."""
    options = (("scale_lr", 0.3),)
    for seed, sparsity in product(range(WHEN[0], WHEN[0] + 4), (0.5, 0.9, 0.7)):
        yield Setting("lead", seed, sparsity, draw=seed, options=options, **STRONG | LATER)
    for seed, sparsity in product(range(4), (0.9, 0.7, 0.5)):
        yield Setting("lead", seed, sparsity, options=options, **STRONG | LATER)


def draws() -> Iterator[Setting]:
    """Ours against gradual pruning from 10 % on, images drawn anew for each seed: half the width, then the whole."""
    for width, tuned in ((NARROW, HALF), (32, STRONG)):
        for seed in range(10, 30):
            for sparsity in (0.7, 0.9):
                yield from (Setting(arm, seed, sparsity, draw=seed, width=width, **tuned) for arm in PAIR)


KNOB_SPARSITIES = (0.5, 0.7, 0.9)
KNOB_SEEDS = range(100, 104)
KNOBS: dict[str, dict[str, Any]] = {
    "the default": {},
    "a MAC counts to the power 0": {"power": 0.0},
    "to the power 0.25": {"power": 0.25},
    "to the power 0.75": {"power": 0.75},
    "to the power 1": {"power": 1.0},
    "blocks go from 0.1 to 0.9": {"begin": 0.1, "end": 0.9},
    "blocks go from 0.2 to 0.5": {"begin": 0.2, "end": 0.5},
    "blocks go from 0.3 to 0.9": {"begin": 0.3, "end": 0.9},
    "scales learn at 0.3 of the rate": {"options": (("scale_lr", 0.3),)},
    "scales learn three times as fast": {"options": (("scale_lr", 3.0),)},
    "ranked by the share of the layer's larger blocks": {"options": (("score", "share"),)},
    "rows of blocks go together": {"options": (("score", "row"),)},
    "columns go together": {"options": (("score", "column"),)},
    "rows and columns go together": {"options": (("score", "both"),)},
    "masked blocks learn at a hundredth of the rate": {"options": (("feedback", 0.01),)},
    "masked blocks learn at a tenth of the rate": {"options": (("feedback", 0.1),)},
}


def knob(change: dict[str, Any], seed: int, sparsity: float) -> Setting:
    """A net of half the width with one change of the default, on the images for tuning."""
    arm = "lead" if "options" in change else "scaled"
    return Setting(arm, seed, sparsity, draw=1, **{"width": NARROW, **HALF, **LATER, **change})


def knobs() -> Iterator[Setting]:
    """What might be set otherwise in nets of half the width, one thing at a time: four seeds for tuning."""
    for seed, change, sparsity in product(KNOB_SEEDS, KNOBS.values(), KNOB_SPARSITIES):
        yield knob(change, seed, sparsity)
