"""What `convert` was asked for, as its passes read it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Lowering:
    """Options of one conversion.

    Args:
        backend: "auto", "triton", "cpu", "reference" or "dense".
        tune: measure engines instead of following the rule.
        example_inputs: the model's arguments, for the sizes that the rule or `tune` goes by; () where not given.
    """

    backend: str = "auto"
    tune: bool = False
    example_inputs: tuple[Any, ...] = ()

    def without_inputs(self) -> Lowering:
        """The same for a part of the model, whose arguments are not the model's."""
        return replace(self, tune=False, example_inputs=())
