"""`StillScales`: scales that the optimizer's steps leave as they are, for the part of the training before blocks go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fxdbsr.layers import BlockedLayer
from fxdbsr.ranks import local


class StillScales:
    """Undoes what a step of `optimizer` does to the trainable scales of `layers`, in them and in its own state.

    Steps with a closure, skipped steps and shards need nothing else: gradients are never looked at. The state starts
    anew at the first step that is not undone, as if scales had joined the training there.
    """

    def __init__(self, optimizer: Optimizer, layers: Sequence[BlockedLayer]) -> None:
        self._optimizer = optimizer
        self._scales = [layer.scale for layer in layers if layer.scale.requires_grad]
        self._before: list[Tensor] | None = None

    def note(self) -> None:
        """Before a step that `undo` shall undo."""
        self._before = [local(scale.detach()).clone() for scale in self._scales]

    @torch.no_grad()
    def undo(self) -> None:
        """After the step; does nothing where `note` was not called before it."""
        if not self._before:
            return
        torch._foreach_copy_([local(scale) for scale in self._scales], self._before)
        states: list[dict[str, Any]] = [self._optimizer.state.get(scale, {}) for scale in self._scales]
        if values := [value for state in states for value in state.values() if isinstance(value, Tensor)]:
            torch._foreach_zero_(values)
        self._before = None
