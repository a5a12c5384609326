"""What tuning found best for each arm, on other images and other seeds than those reported.

Learning rate and weight decay by the plans "tune", "tune_narrow" and "tune_deep", when blocks go by the plan "when".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from bench.accuracy_setting import Setting

STRONG: dict[str, Any] = {"lr": 0.8, "weight_decay": 2e-3}
LATER: dict[str, Any] = {"begin": 0.3}
GRADUAL = ("scaled", "gradual", "gradual_layer", "channels")  # arms whose blocks or channels go bit by bit
TUNED: dict[str, dict[str, Any]] = defaultdict(
    lambda: STRONG, dict.fromkeys(GRADUAL, STRONG | LATER), slim={"lr": 0.8, "weight_decay": 1e-3}
)
NARROW = 16
HALF: dict[str, Any] = {"lr": 0.4, "weight_decay": 2e-3}
TUNED_NARROW: dict[str, dict[str, Any]] = defaultdict(
    lambda: HALF,
    dict.fromkeys(GRADUAL, HALF | LATER),
    channels={"lr": 0.4, "weight_decay": 1e-3, **LATER},
    once={"lr": 0.4, "weight_decay": 1e-3},
    once_layer={"lr": 0.4, "weight_decay": 1e-3},
    slim={"lr": 0.2, "weight_decay": 2e-3},
)
DEEP: dict[str, Any] = {"width": NARROW, "depth": 2}
TUNED_DEEP: dict[str, dict[str, Any]] = defaultdict(
    lambda: DEEP | HALF,
    dict.fromkeys(GRADUAL, DEEP | HALF | LATER),
    channels=DEEP | LATER | {"lr": 0.8, "weight_decay": 1e-3},
    once=DEEP | STRONG | {"end": 0.5},
    once_layer=DEEP | STRONG,
    slim=DEEP | {"lr": 0.4, "weight_decay": 1e-3},
)
DIGITS: dict[str, Any] = {"data": "digits", "width": 16, "epochs": 10, "batch": 64, **STRONG}
TUNED_DIGITS: dict[str, dict[str, Any]] = defaultdict(lambda: DIGITS, dict.fromkeys(GRADUAL, DIGITS | LATER))


def at(arm: str, seed: int, sparsity: float, tuned: Mapping[str, Any], width: int = 32) -> Setting:
    """An arm with what was found best for it; where few channels stay, or few blocks by layer, they go earlier.

    When one-shot pruning goes was tuned in the deeper net alone.
    """
    sooner = {"begin": 0.1} if arm == "channels" and sparsity == 0.9 else {}
    if arm == "once_layer" and sparsity == 0.9 and tuned.get("depth") == DEEP["depth"]:
        sooner = {"end": 0.4}
    return Setting(arm, seed, sparsity, **{"width": width, **tuned, **sooner})
