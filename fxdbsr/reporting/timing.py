"""Milliseconds of each layer as it is and in its dense form, on the inputs that it had in the model."""

from __future__ import annotations

from torch import nn

from fxdbsr.reporting.count import Tally
from fxdbsr.reporting.rows import LayerRow


def with_times(model: nn.Module, tally: Tally) -> list[LayerRow]:
    """The rows of `tally` with `ms_dense` and `ms`."""
    raise NotImplementedError
