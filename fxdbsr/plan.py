"""`Plan`: what a `Sparsifier` was asked for, checked, and what that means at each step.

The cubic rise is that of Zhu and Gupta, To prune, or not to prune (2017).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fxdbsr.scales import check_cost, check_fraction

BEGIN, END = 0.3, 0.67  # with a target


@dataclass(frozen=True)
class Plan:
    """The options of a `Sparsifier`, as `Plan.checked` has found them good; steps count from 1."""

    target: float | None
    gamma: float | None
    shrink: float | None
    of: str
    steps: int | None
    begin: float
    end: float
    interval: int
    cost_weights: Mapping[str, float]
    cost_power: float

    @classmethod
    def checked(cls, **options: Any) -> Plan:
        """The plan of these options; None stands for the default of `begin`, `end`, `interval`, `cost_weights`.

        Raises:
            ValueError, TypeError: an option that is missing or out of its range, or two that exclude each other.
        """
        ways = {key: options[key] for key in ("target", "gamma", "shrink")}
        if sum(value is not None for value in ways.values()) != 1:
            got = ", ".join(f"{key}={value!r}" for key, value in ways.items())
            raise ValueError(f"expected exactly one of target and gamma (or shrink), got {got}")
        if ways["target"] is not None:
            options["target"] = check_fraction(ways["target"], "target", below_one=True)
        for key in ("gamma", "shrink", "cost_power"):
            options[key] = check_strength(options[key], key)
        check_cost(options["of"], "of")
        if options["steps"] is None and ways["gamma"] is None:
            raise ValueError("steps: the number of optimizer steps of the whole training is required, got None")
        for key in ("steps", "interval"):
            options[key] = check_count(options[key], key)
        options["begin"], options["end"] = _check_span(options["begin"], options["end"], ways["target"] is not None)
        options["interval"] = options["interval"] or max(1, (options["steps"] or 0) // 200)
        options["cost_weights"] = _check_weights(options["cost_weights"])
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain numbers, strings and dicts."""
        return asdict(self)

    def is_before(self, step: int) -> bool:
        """True before `begin`; without `steps` never."""
        return self.steps is not None and step < self.begin * self.steps

    def is_inside(self, step: int) -> bool:
        """True from `begin` to `end`; without `steps` always."""
        return self.steps is None or self.begin * self.steps <= step <= self.last

    def is_over(self, step: int) -> bool:
        """True from the step on after which the mask is frozen."""
        return self.steps is not None and step >= self.last

    def is_due(self, step: int) -> bool:
        """True at every `interval`-th step from `begin` to `end`."""
        first = 0 if self.steps is None else math.ceil(self.begin * self.steps)
        return self.is_inside(step) and (step - first) % self.interval == 0

    @property
    def last(self) -> int:
        """The step after which the mask is frozen."""
        assert self.steps is not None
        return max(1, math.ceil(self.end * self.steps))

    def sparsity(self, step: int) -> float:
        """`target * (1 - (1 - u)^3)`, u from 0 at `begin` to 1 at `end`."""
        assert self.target is not None
        assert self.steps is not None
        start, stop = self.begin * self.steps, self.end * self.steps
        u = 1.0 if step >= stop else max(0.0, (step - start) / (stop - start))
        return self.target * (1 - (1 - u) ** 3)

    def shrink_per_step(self) -> float:
        """What `shrink` comes to at each step from `begin` to `end`."""
        assert self.shrink is not None
        assert self.steps is not None
        first = max(1, math.ceil(self.begin * self.steps))
        return self.shrink / max(1, self.last - first + 1)


def _check_span(begin: Any, end: Any, with_target: bool) -> tuple[float, float]:
    """`begin` and `end` as fractions, or what they are by default."""
    if end is None:
        end = END if with_target else 1.0
    end = check_fraction(end, "end")
    if begin is None:
        begin = min(BEGIN, end / 2) if with_target else 0.0
    begin = check_fraction(begin, "begin")
    if begin > end:
        raise ValueError(f"begin: expected at most end = {end}, got {begin}")
    return begin, end


def check_strength(value: Any, where: str) -> float | None:
    """`value` as a finite float that is not negative, or None.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{where}: expected a number, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{where}: expected a finite number that is not negative, got {value!r}")
    return float(value)


def check_count(value: Any, where: str) -> int | None:
    """`value` as an int of at least 1, or None.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: expected an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{where}: expected at least 1, got {value}")
    return value


def _check_weights(weights: Any) -> dict[str, float]:
    if weights is None:
        return {}
    if not isinstance(weights, Mapping):
        raise TypeError(f"cost_weights: expected a dict from layer names to numbers, got {weights!r}")
    for name, value in weights.items():
        if check_strength(value, f"cost_weights[{name!r}]") in (None, 0.0):
            raise ValueError(f"cost_weights[{name!r}]: expected a positive number, got {value!r}")
    return {name: float(value) for name, value in weights.items()}
