"""One forward of a model, watched: which layers it calls, on what shapes, and the FLOPs of each.

Every conv and linear module gets a hook, every functional conv is caught by a `TorchFunctionMode`, and
`torch.utils.flop_counter` counts below them. Attention is made to run as the products that the counter knows.
Nothing of the model is different afterwards: hooks, modes and recorded positions are put back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fxdbsr.calls import FUNCTIONS
from fxdbsr.nn.packed import PackedConv
from fxdbsr.nn.scaled import Blocked, ScaledFunction, plain_type

Layer: TypeAlias = nn.Module | Callable[..., Any]


@dataclass
class Call:
    """One call of a layer.

    Attributes:
        layer: the module or function.
        args, kwargs: what it was called with; without the tensors of the forward where inputs are not kept.
        macs: what ran, in MACs.
    """

    layer: Layer
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int


@dataclass
class Observation:
    """What one forward did.

    Attributes:
        modules: the calls of each conv and linear module, in the order of the first ones.
        functions: every call of a functional conv outside of those, in order.
        macs: of the whole forward.
    """

    modules: list[list[Call]]
    functions: list[Call]
    macs: int


def is_layer(module: nn.Module) -> bool:
    """True for modules that get a row of their own when they are called."""
    return isinstance(module, PackedConv | ScaledFunction) or plain_type(type(module)) is not None


class _Watch(TorchFunctionMode):
    """Hooks and function mode of one forward; a layer inside another layer belongs to the outer one."""

    def __init__(self, counter: FlopCounterMode, keep: bool) -> None:
        super().__init__()
        self.counter, self.keep = counter, keep
        self.modules: dict[int, list[Call]] = {}
        self.functions: list[Call] = []
        self.open: list[int] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        self.open.append(self.counter.get_total_flops())

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = self.open.pop()
        if not self.open:
            calls = self.modules.setdefault(id(module), [])
            calls.append(self.call(module, args, kwargs, output, before))

    def call(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, before: int) -> Call:
        shapes = (_shape((args, kwargs)), _shape(output))
        flops = self.counter.get_total_flops() - before
        if not self.keep and isinstance(layer, PackedConv):
            args, kwargs = (), {}
        elif not self.keep:
            args, kwargs = (None, *args[1:]), {k: v for k, v in kwargs.items() if k != "input"}
        return Call(layer, args, kwargs, *shapes, flops // 2)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.open or func not in FUNCTIONS or FUNCTIONS[func][0] is nn.Linear:
            return func(*args, **kwargs)
        before = self.counter.get_total_flops()
        output = func(*args, **kwargs)
        self.functions.append(self.call(func, args, kwargs, output, before))
        return output


def _shape(value: Any) -> tuple[int, ...]:
    """Shape of the first tensor in `value`."""
    return next((tuple(leaf.shape) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)), ())


def observe(model: nn.Module, inputs: tuple[Any, ...], keep_inputs: bool = False) -> Observation:
    """Run `model(*inputs)` once in eval mode, without gradients, and tell what was called.

    Args:
        keep_inputs: keep the layers' inputs in `Call.args`, which holds all activations in memory.
    """
    counter = FlopCounterMode(display=False)
    watch = _Watch(counter, keep_inputs)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for module in model.modules():
            if is_layer(module):
                pre = module.register_forward_pre_hook(watch.enter, prepend=True)
                post = module.register_forward_hook(watch.leave, prepend=True, with_kwargs=True)
                stack.callback(pre.remove)
                stack.callback(post.remove)
        stack.enter_context(_attention_in_products())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Using `torch.compile")  # about the counter's global hooks
        stack.enter_context(counter)
        stack.enter_context(watch)
        model(*inputs)
    return Observation(list(watch.modules.values()), watch.functions, counter.get_total_flops() // 2)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside; modes and recorded positions as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    positions = [(m, list(m.positions)) for m in model.modules() if isinstance(m, Blocked)]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for blocked, before in positions:
            blocked.positions = before


@contextmanager
def _attention_in_products() -> Iterator[None]:
    """Attention as matrix products: no fused path, whose FLOPs the counter does not see."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
