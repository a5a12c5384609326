"""torch.fx's tracer, with convs kept whole, writes in place kept as they are, and values taken for tensors."""

from __future__ import annotations

import builtins
import operator
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd


class _Proxy(fx.Proxy):
    """Keeps `x += y` a write in place: torch.fx turns it into `x = x + y`, other memory and another meaning."""


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        proxy: fx.Proxy = self.tracer.create_proxy("call_function", function, (self, other), {})
        return proxy

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class Tracer(fx.Tracer):
    """Keeps every conv and linear layer whole, whatever module defines its class."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """As torch.fx, with writes in place kept."""
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """True for layers that appear in the graph as one call."""
        return (
            isinstance(m, _ConvNd | nn.Linear)
            or getattr(m, "is_leaf_in_trace", False)
            or is_frozen_norm(m)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def __init__(self) -> None:
        super().__init__()
        self._constants: set[str] = set()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """As torch.fx, but for forwards of which a graph would keep what was true while it was traced.

        Raises:
            ValueError: it draws random numbers for itself, or switches gradients or autocast on or off.
        """
        self._modes, drawn = modes(), random_states()
        try:
            graph = super().trace(root, concrete_args)
            if random_states() != drawn:
                raise ValueError("its forward draws random numbers, which a graph would hold for ever")
        finally:
            set_random_states(drawn)
        return graph

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """As torch.fx, in the modes in which the trace began."""
        if modes() != self._modes:
            raise ValueError("its forward switches gradients or autocast, which no graph holds")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """As torch.fx; a tensor that the forward makes is named as in an earlier trace that made the same."""
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            for name, known in self.root.__dict__.items():
                if name.startswith("_tensor_constant") and name not in self._constants and _same_constant(known, a):
                    self.tensor_attrs[a] = name
                    break
        made = super().create_arg(a)
        if isinstance(made, fx.Node) and made.op == "get_attr":
            self._constants.add(str(made.target))
        return made

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """As torch.fx, with `conv(input=x)` written as `conv(x)`, which is what passes and hooks read."""
        if not args and "input" in kwargs and (isinstance(m, _ConvNd) or m.__module__.startswith("torch.nn.")):
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"),)
        return super().call_module(m, forward, args, kwargs)


def modes() -> tuple[bool, ...]:
    """What a forward may switch for a part of itself."""
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def random_states() -> tuple[Any, bytes]:
    """The states of Python's generator and of torch's on the CPU."""
    return random.getstate(), bytes(torch.get_rng_state().tolist())


def set_random_states(states: tuple[Any, bytes]) -> None:
    """The inverse of `random_states`."""
    random.setstate(states[0])
    torch.set_rng_state(torch.tensor(list(states[1]), dtype=torch.uint8, device="cpu"))


def is_frozen_norm(module: nn.Module) -> bool:
    """True for torchvision's batch norm whose statistics and factors are buffers."""
    return (type(module).__module__, type(module).__name__) == ("torchvision.ops.misc", "FrozenBatchNorm2d")


def _same_constant(a: Any, b: Tensor) -> bool:
    kinds = [(t.dtype, t.device, t.shape) for t in (a, b) if isinstance(t, Tensor)]
    return len(kinds) == 2 and kinds[0] == kinds[1] and torch.equal(a, b)


def is_size(node: fx.Node) -> bool:
    """True where `node` is no tensor for certain: a size of one, or what Python computes with sizes."""
    if node.op == "call_method":
        return node.target in _SIZES
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _ATTRIBUTES
    return node.target in _ARITHMETIC and all(map(is_size, node.all_input_nodes))


_SIZES = {"size", "dim", "ndimension", "numel", "stride"}
_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}
_ARITHMETIC = {
    operator.getitem, operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod,
    operator.neg, operator.pow,
}  # fmt: skip


@contextmanager
def values_are_tensors() -> Iterator[None]:
    """Let models that ask `isinstance(x, Tensor)` get True for the stand-ins of tensors that they are traced with.

    torch.fx answers False, and so records the branch that no tensor takes. Its own questions stay as they are, and so
    do those about sizes.
    """
    real = builtins.isinstance

    def answer(value: Any, kinds: Any) -> bool:
        if type(value) is _Proxy and not _asked_by_torch() and not is_size(value.node):
            return issubclass(Tensor, kinds)
        return real(value, kinds)

    builtins.isinstance = answer
    try:
        yield
    finally:
        builtins.isinstance = real


def _asked_by_torch() -> bool:
    asking = str(sys._getframe(2).f_globals.get("__name__", ""))
    return asking.startswith("torch.") or asking == __name__
