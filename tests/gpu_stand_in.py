"""A tensor of the CPU that code which asks for a GPU takes for one of its own."""

from __future__ import annotations

from torch import Tensor


class SaysCuda(Tensor):
    """Its `device` is the CPU."""

    is_cuda = True


def on_a_gpu(tensor: Tensor) -> Tensor:
    """`tensor`, which says that it is on a GPU."""
    return tensor.as_subclass(SaysCuda)
