"""What bench/accuracy.py runs: lists of settings, in order of value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench.accuracy_plans_default import PAIR, draws, knobs, rate, when
from bench.accuracy_setting import Setting
from bench.accuracy_trials import FIFTH, FIRST, SECOND, SEVENTH, SIXTH, TRIALS, trials
from bench.accuracy_trials import NARROW as NARROW_TRIAL
from bench.accuracy_tuned import (
    DEEP,
    DIGITS,
    GRADUAL,
    LATER,
    NARROW,
    STRONG,
    TUNED,
    TUNED_DEEP,
    TUNED_DIGITS,
    TUNED_NARROW,
    at,
)  # fmt: skip

SEEDS = (0, 1, 2, 3, 4)
TUNING_SEEDS = (100, 101)
TUNING_DRAW = 1
NARROW_RATES = ((0.8, 2e-3), (0.4, 2e-3), (0.8, 1e-3), (0.4, 1e-3), (0.2, 2e-3), (0.2, 1e-3), (0.4, 5e-4))
GAMMAS = (3e-4, 1e-3, 4e-3, 1.6e-2)
SPARSE = ("scaled", "gradual", "once", "channels", "slim", "gradual_layer", "once_layer")


def tuning(arm: str, sparsity: float | None, seed: int, **changes: Any) -> Setting:
    """A run on the images and seeds for tuning."""
    return Setting(arm, seed, sparsity, draw=TUNING_DRAW, **changes)


def tune() -> Iterator[Setting]:
    """Learning rate and weight decay of every arm."""
    arms = (("scaled", 0.9), ("gradual", 0.9), ("once", 0.9), ("channels", 0.9), ("slim", 0.9), ("dense", None))
    rates = ((0.4, 1e-3), (0.2, 1e-3), (0.8, 1e-3), (0.4, 5e-4), (0.4, 2e-3), (0.8, 2e-3), (0.8, 4e-3), (1.6, 2e-3))
    for lr, decay in rates:
        for arm, sparsity in arms:
            yield tuning(arm, sparsity, TUNING_SEEDS[0], lr=lr, weight_decay=decay)


def tune_clamp() -> Iterator[Setting]:
    """Which gammas lead the authors' form where."""
    for gamma in (1e-3, 4e-3, 1.6e-2):
        yield tuning("clamp", None, TUNING_SEEDS[0], gamma=gamma, **TUNED["clamp"])
    for gamma in (1e-3, 4e-3):
        yield tuning("clamp", None, TUNING_SEEDS[0], gamma=gamma)


def comparison() -> Iterator[Setting]:
    """All arms, seed by seed, so that any beginning of the list compares all arms over the same seeds."""
    for seed in SEEDS:
        yield Setting("dense", seed, **TUNED["dense"])
        yield from arms(seed, (0.5, 0.7, 0.9))


def more_seeds() -> Iterator[Setting]:
    """Five seeds more of the default, gradual pruning and dense nets; twenty at 50 %, on whose edge the first were."""
    for seed in range(len(SEEDS), 2 * len(SEEDS)):
        yield Setting("dense", seed, **TUNED["dense"])
        for sparsity in (0.5, 0.9, 0.7, 0.3):
            yield from (Setting(arm, seed, sparsity, **TUNED[arm]) for arm in PAIR)
    for seed in range(2 * len(SEEDS), 5 * len(SEEDS)):
        yield from (Setting(arm, seed, 0.5, **TUNED[arm]) for arm in PAIR)


def clamp() -> Iterator[Setting]:
    """The authors' form, which takes gamma where others take a sparsity."""
    for seed in SEEDS:
        for gamma in GAMMAS:
            yield Setting("clamp", seed, gamma=gamma, **TUNED["clamp"])


def clamp_digits() -> Iterator[Setting]:
    """The authors' form on the digits."""
    for seed in SEEDS:
        yield from (Setting("clamp", seed, gamma=gamma, **DIGITS) for gamma in GAMMAS)


def low() -> Iterator[Setting]:
    """The lowest sparsity, where all arms are near the dense net; pruning by layer comes last."""
    settings = [setting for seed in SEEDS for setting in arms(seed, (0.3,))]
    yield from sorted(settings, key=lambda setting: setting.arm.endswith("_layer"))


def tune_digits() -> Iterator[Setting]:
    """Learning rate and weight decay on the digits, seeds that are not reported."""
    for changes in (STRONG, {"lr": 0.4, "weight_decay": 2e-3}, {"lr": 0.2, "weight_decay": 1e-3}):
        for arm in ("scaled", "gradual", "once", "channels", "slim"):
            yield Setting(arm, TUNING_SEEDS[0], 0.9, **DIGITS | changes)


def digits() -> Iterator[Setting]:
    """All arms on the digits."""
    for seed in SEEDS:
        yield Setting("dense", seed, **DIGITS)
        yield from arms(seed, (0.5, 0.7, 0.9, 0.3), TUNED_DIGITS)


def arms(seed: int, sparsities: tuple[float, ...], tuned: Mapping[str, dict[str, Any]] = TUNED) -> Iterator[Setting]:
    """Every arm that takes a sparsity, with what was found best for it."""
    for sparsity in sparsities:
        for arm in SPARSE:
            yield at(arm, seed, sparsity, tuned[arm])


def tune_narrow() -> Iterator[Setting]:
    """Learning rate and weight decay for a net of half the width, at the sparsity that matters most there."""
    for lr, decay in NARROW_RATES:
        for arm in ("scaled", "gradual", "once", "once_layer", "gradual_layer", "channels", "slim", "dense"):
            sparsity = None if arm == "dense" else 0.7
            yield tuning(arm, sparsity, TUNING_SEEDS[0], lr=lr, weight_decay=decay, width=NARROW)


def narrow() -> Iterator[Setting]:
    """All arms in a net of half the width, at 70 % first: one-shot pruning should fall further behind there."""
    yield from (Setting("dense", seed, width=NARROW, **TUNED_NARROW["dense"]) for seed in SEEDS)
    for sparsity in (0.7, 0.9, 0.5, 0.3):
        for seed in SEEDS:
            yield from (at(arm, seed, sparsity, TUNED_NARROW[arm], NARROW) for arm in SPARSE)


def narrow_seeds() -> Iterator[Setting]:
    """More seeds of the half width, whose nets vary by points: 35, at 90 % 41, at 30 % 11; of one-shot pruning 5."""
    for seed in range(len(SEEDS), len(SEEDS) + 35):
        yield Setting("dense", seed, width=NARROW, **TUNED_NARROW["dense"])
        for sparsity in (0.7, 0.9, 0.5, 0.3) if seed < len(SEEDS) + 11 else (0.7, 0.9, 0.5):
            yield from (Setting(arm, seed, sparsity, width=NARROW, **TUNED_NARROW[arm]) for arm in PAIR)
    for seed in range(len(SEEDS), 2 * len(SEEDS)):
        for sparsity in (0.7, 0.9):
            for arm in ("once", "once_layer"):
                yield Setting(arm, seed, sparsity, width=NARROW, **TUNED_NARROW[arm])
    for seed in range(len(SEEDS) + 35, len(SEEDS) + 41):
        yield from (Setting(arm, seed, 0.9, width=NARROW, **TUNED_NARROW[arm]) for arm in PAIR)


def tune_deep() -> Iterator[Setting]:
    """Learning rate and weight decay for a net of half the width and twice the depth, at 70 %; when one-shot goes."""
    for seed in TUNING_SEEDS:
        for lr, decay in NARROW_RATES:
            for arm in ("scaled", "gradual", "once", "once_layer", "gradual_layer", "channels", "slim", "dense"):
                later = LATER if arm in GRADUAL else {}
                sparsity = None if arm == "dense" else 0.7
                yield tuning(arm, sparsity, seed, lr=lr, weight_decay=decay, **DEEP, **later)
        for sparsity in (0.7, 0.9):
            for arm in ("once", "once_layer"):
                for end in (0.4, 0.5, 0.67) if sparsity == 0.9 else (0.4, 0.5):
                    yield tuning(arm, sparsity, seed, **TUNED_DEEP[arm] | {"end": end})


def deep() -> Iterator[Setting]:
    """All arms in a net of half the width and twice the depth, as long as the wider one."""
    for seed in SEEDS:
        yield Setting("dense", seed, **TUNED_DEEP["dense"])
        for sparsity in (0.7, 0.9, 0.5):
            yield from (at(arm, seed, sparsity, TUNED_DEEP[arm], NARROW) for arm in SPARSE)


def deep_seeds() -> Iterator[Setting]:
    """Fifteen seeds more of the deeper net at 50 % and 70 %, four at 90 %; of one-shot pruning without 50 %."""
    for seed in range(len(SEEDS), len(SEEDS) + 15):
        yield Setting("dense", seed, **TUNED_DEEP["dense"])
        for sparsity in (0.7, 0.5, 0.9) if seed < len(SEEDS) + 4 else (0.7, 0.5):
            arms = PAIR if sparsity == 0.5 else (*PAIR, "once", "once_layer")
            yield from (at(arm, seed, sparsity, TUNED_DEEP[arm], NARROW) for arm in arms)


def deep_low() -> Iterator[Setting]:
    """The lowest sparsity in the deeper net: the default and global gradual pruning."""
    for seed in SEEDS:
        yield from (Setting(arm, seed, 0.3, **TUNED_DEEP[arm]) for arm in PAIR)


def deep_rates() -> Iterator[Setting]:
    """The best three rates of the deeper net in five tuning seeds more; half the tuned rate on the reported images."""
    for seed in range(TUNING_SEEDS[1] + 1, TUNING_SEEDS[1] + 6):
        for lr, decay in ((0.4, 2e-3), (0.2, 2e-3), (0.8, 1e-3)):
            for arm in PAIR:
                yield tuning(arm, 0.7, seed, lr=lr, weight_decay=decay, **DEEP, **LATER)
            yield tuning("dense", None, seed, lr=lr, weight_decay=decay, **DEEP)
        for decay in (2e-3, 1e-3):
            yield tuning("once", 0.7, seed, **TUNED_DEEP["once"] | {"weight_decay": decay})
    slow = {"lr": 0.2}
    for seed in range(len(SEEDS) + 4):
        yield from (Setting(arm, seed, 0.7, **TUNED_DEEP[arm] | slow) for arm in PAIR)
        yield Setting("dense", seed, **TUNED_DEEP["dense"] | slow)
    for seed in SEEDS:
        for sparsity in (0.5, 0.9, 0.3):
            yield from (Setting(arm, seed, sparsity, **TUNED_DEEP[arm] | slow) for arm in PAIR)


def ranking() -> Iterator[Setting]:
    """By which scales blocks are ranked: ten narrow nets, then ten with blocks of 16x16."""
    for shared in (NARROW_TRIAL, {"block": (16, 16)}):
        chosen = [t for t in FIRST + SECOND if t.shared == shared and dict(t.options) in ({}, {"score": "effective"})]
        for seed in range(TUNING_SEEDS[0], TUNING_SEEDS[0] + 10):
            yield chosen[0].theirs(seed, 0.9, TUNING_DRAW)
            yield from (trial.ours(seed, 0.9, TUNING_DRAW) for trial in chosen)


def ten_seeds() -> Iterator[Setting]:
    """What led by a point or so in three nets, in ten: nets without shortcuts, and tall blocks."""
    chosen = [t for t in TRIALS if t.idea in ("ranked by the scales of the start, no shortcuts", "tall blocks of 16x4")]
    for seed in range(TUNING_SEEDS[0], TUNING_SEEDS[0] + 10):
        for trial in chosen:
            yield from (trial.theirs(seed, 0.9, TUNING_DRAW), trial.ours(seed, 0.9, TUNING_DRAW))


def fine_tune() -> Iterator[Setting]:
    """Nets trained on another task, then sparse on theirs: the default, its first ranking, gradual pruning."""
    for seed in range(TUNING_SEEDS[0], TUNING_SEEDS[0] + 5):
        sides = [side(seed, 0.9, TUNING_DRAW) for trial in FIFTH for side in (trial.theirs, trial.ours)]
        yield from dict.fromkeys(sides)


def steps() -> Iterator[Setting]:
    """Blocks of 32x32 in wide nets, how far scales step, clipped gradients: a look with two seeds."""
    found = [side(seed, 0.9, TUNING_DRAW) for seed in TUNING_SEEDS for t in SIXTH for side in (t.theirs, t.ours)]
    yield from dict.fromkeys(found)


def still() -> Iterator[Setting]:
    """Scales that stand still until blocks go, in ten seeds."""
    for seed in range(TUNING_SEEDS[0], TUNING_SEEDS[0] + 10):
        for trial in SEVENTH:
            yield from (trial.theirs(seed, 0.9, TUNING_DRAW), trial.ours(seed, 0.9, TUNING_DRAW))


def confirm() -> Iterator[Setting]:
    """What led on the images for tuning, on those reported: channels reordered without scales, tall blocks."""
    (reordered,) = (t for t in TRIALS if t.options == {"order": 10, "scales": False} and not t.shared)
    for seed in (*TUNING_SEEDS, 102, 103, 104):
        yield from (reordered.theirs(seed, 0.9, TUNING_DRAW), reordered.ours(seed, 0.9, TUNING_DRAW))
    for sparsity in (0.9, 0.7):
        yield from (reordered.ours(seed, sparsity, 0) for seed in SEEDS)
    (tall,) = (t for t in TRIALS if t.idea == "tall blocks of 16x4")
    for seed in SEEDS:
        yield from (tall.theirs(seed, 0.9, 0), tall.ours(seed, 0.9, 0))


def screen() -> Iterator[Setting]:
    """The trials, on images and seeds that are not reported."""
    return trials((100, 101, 102))


ALL = (
    tune, when, rate, tune_clamp, tune_digits, tune_narrow, comparison, more_seeds, clamp, low, digits,
    clamp_digits, narrow, narrow_seeds, tune_deep, deep, deep_seeds, deep_low, deep_rates, draws, screen,
    ranking, ten_seeds, fine_tune, steps, still, confirm, knobs,
)  # fmt: skip
PLANS: dict[str, Callable[[], Iterator[Setting]]] = {plan.__name__: plan for plan in ALL}
