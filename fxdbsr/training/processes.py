"""The processes of a training: one, or those that torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank: number of this process; 0 prints and writes.
        count: how many there are.
        device: where this one computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """True where this process prints and writes."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all processes."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def average_(self, values: Iterable[torch.Tensor]) -> None:
        """Bring floating-point `values` to their mean over all processes, in place."""
        if self.count > 1:
            for value in values:
                if value.is_floating_point():
                    dist.all_reduce(value)
                    value.div_(self.count)

    def least(self, value: int) -> int:
        """The least `value` of all processes."""
        if self.count == 1:
            return value
        found = torch.tensor(value, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    def of_first(self, value: Any) -> Any:
        """What the first process gives as `value`, a copy on all others."""
        sent = [value]
        if self.count > 1:
            dist.broadcast_object_list(sent, src=0)
        return sent[0]

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun has started, if it has; leave them in the end.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1", ...; under torchrun every process takes a GPU of its own.

    Raises:
        ValueError: no such device.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    count = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        found = torch.device(kind if device == "auto" else device)
        if found.type == "cuda":
            found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", found.index or 0)))
            torch.cuda.set_device(found)
        float(torch.zeros((), device=found))  # "meta" holds no values
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device!r} cannot be used here: {error}") from error
    if "LOCAL_RANK" not in os.environ:
        yield Processes(0, 1, found)
        return
    dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), count, found)
    finally:
        dist.destroy_process_group()
