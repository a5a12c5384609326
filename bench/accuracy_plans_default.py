"""Plans of bench/accuracy.py that the default rests on: when blocks go, how fast scales learn, images drawn anew."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

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
