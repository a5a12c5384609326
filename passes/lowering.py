"""What `convert` was asked for, as its passes read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lowering:
    """Options of one conversion.

    Args:
        backend: "auto", "triton", "cpu", "reference" or "dense".
    """

    backend: str = "auto"
