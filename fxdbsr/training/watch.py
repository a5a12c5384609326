"""`Watch`: the mean of the losses, and the step at which one was NaN or infinite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxdbsr.ranks import local
from fxdbsr.training.processes import Processes

NEVER = 2**62


class Watch:
    """Sees the loss of every step; on a GPU without waiting for it, so that it is looked at every 50 steps.

    Args:
        processes: those whose losses are seen.
        first: number of the steps before.
    """

    def __init__(self, processes: Processes, first: int) -> None:
        self.processes, self.steps, self.first = processes, 0, first
        self.every = 1 if processes.device.type == "cpu" else 50
        self._sum = torch.zeros((), dtype=torch.float64, device=processes.device)
        self._bad = torch.full((), NEVER, device=processes.device)

    def see(self, loss: Tensor) -> None:
        """Note the loss of the next step.

        Raises:
            ValueError: on some process one was NaN or infinite.
        """
        self.steps += 1
        self._sum += loss
        now = torch.full_like(self._bad, self.first + self.steps)
        self._bad = torch.where(loss.isfinite(), self._bad, torch.minimum(self._bad, now))
        if self.steps % self.every == 0:
            self.check()

    def check(self) -> None:
        """Look at all losses seen.

        Raises:
            ValueError: on some process one was NaN or infinite.
        """
        bad = self.processes.least(int(self._bad))
        if bad < NEVER:
            raise ValueError(
                f"step {bad}: the loss is NaN or infinite; nothing of this epoch is saved: lower lr, or amp = 'bf16' "
                "in place of 'fp16'"
            )

    @torch.no_grad()
    def check_weights(self, net: nn.Module) -> None:
        """Look at the weights that the last step has left, whose loss nobody sees.

        Raises:
            ValueError: on some process one is NaN or infinite.
        """
        finite = torch.stack([local(weight).isfinite().all() for weight in net.parameters()]).all()
        if not self.processes.least(int(finite)):
            raise ValueError(
                f"step {self.first + self.steps}: a weight is NaN or infinite after it; nothing of this epoch is "
                "saved: lower lr"
            )

    def mean(self) -> float:
        """The mean loss of all steps and processes.

        Raises:
            ValueError: on some process one was NaN or infinite.
        """
        self.check()
        return float(self.processes.sum(self._sum)) / self.steps / self.processes.count
