"""Whether a call on a GPU may take a kernel that only knows tensors: nobody watches, and Triton can run there."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad


def is_plain(*tensors: Tensor | None) -> bool:
    """True outside of tracers, compilers, modes, transforms and gradients, which know torch's own; with images."""
    held = [tensor for tensor in tensors if tensor is not None]
    if any(issubclass(type(tensor), fx.Proxy) for tensor in held):  # isinstance may say what the model wants to hear
        return False
    watched = (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or is_transformed()
        or forward_ad._current_level >= 0
    )
    tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in held)
    return not watched and not tracked and held[0].shape[0] > 0


def is_transformed() -> bool:
    """True inside of the transforms of torch.func; not while torch compiles, which has them in its graph."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


@cache
def runs_triton(device: torch.device) -> bool:
    """True where Triton is installed and `device` is an NVIDIA GPU of compute capability 8.0 and more."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        return find_spec("triton") is not None
    except (ImportError, ValueError):  # sys.modules["triton"] is None or has no spec
        return False
