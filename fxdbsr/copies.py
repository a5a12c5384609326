"""A copy of a model that its user goes on using."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of `model`.

    What a forward computed and left on a module, as hooks of `torch.nn.utils` do, is copied without its history.

    Args:
        memo: as `copy.deepcopy` takes it: what the copy has in place of the objects with these ids.

    Raises:
        ValueError: something in it cannot be copied.
    """
    kept = [value for module in model.modules() for value in module.__dict__.values() if isinstance(value, Tensor)]
    try:
        return copy.deepcopy(model, {id(t): t.detach().clone() for t in kept if not t.is_leaf} | (memo or {}))
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be copied: {error}") from error
