"""Traced models: graph modules that keep their model's state.

`torch.fx` bakes what the Python code does into the graph, `if self.training` among it. A model is therefore
traced in both modes. Where the two graphs agree, a `TracedModule` holds the one; where they differ (auxiliary
heads, stochastic depth, `F.dropout`), a `TwoGraphModule` runs the one that fits `self.training`.
"""

from __future__ import annotations

import copy
import keyword
import linecache
import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any, Self

from torch import Tensor, fx, nn
from torch.fx.graph import PythonCode
from torch.fx.graph_module import _CodeOnlyModule, _loader, reduce_graph_module

from fxdbsr.graph import functional_scales
from fxdbsr.nn.scaling import keeping_float32
from fxdbsr.tracer import Tracer, values_are_tensors

STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class _LikeRoot(nn.Module):
    """Changes its mode as the traced model does: by that model's own `train`, where its class has one."""

    def follow(self, root: nn.Module) -> None:
        """Take the mode of `root`, whose state this module shares, and keep it for its `train`."""
        self.training = root.training
        if type(root).train not in (nn.Module.train, _LikeRoot.train):
            self.__dict__["_root"] = root  # past nn.Module, to which it would be one more submodule

    def train(self, mode: bool = True) -> Self:
        """As the traced model; what it keeps frozen stays so."""
        root = self.__dict__.get("_root")
        if root is None:
            return super().train(mode)
        root.train(mode)
        self.training = root.training
        return self


class GraphModule(fx.GraphModule):
    """A graph module whose generated source goes when it goes; torch.fx alone would keep every one for ever."""

    def recompile(self) -> PythonCode:
        """As torch.fx."""
        code = super().recompile()
        forward = type(self).forward
        weakref.finalize(forward, _forget_source, forward.__code__.co_filename).atexit = False
        return code


def _forget_source(name: str) -> None:
    _loader.eval_cache.pop(name, None)
    linecache.cache.pop(name, None)


class TracedModule(_LikeRoot, GraphModule):
    """A GraphModule over all of `root`'s state, also the part that the graph does not read.

    A plain GraphModule copies only what its graph refers to, and so forgets names and non-persistent marks.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str | None = None) -> None:
        super().__init__(root, graph, class_name or type(root).__name__)
        constants = {
            node.target: root.__dict__[node.target]
            for node in graph.nodes
            if node.op == "get_attr" and isinstance(root.__dict__.get(node.target), Tensor)
        }
        _share_state(root, self)
        for name, constant in constants.items():
            del root.__dict__[name]
            self.register_buffer(name, constant, persistent=False)
        self.follow(root)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(keeping_float32(fn, functional_scales([self])), recurse)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModule:
        new = super().__deepcopy__(memo)
        assert isinstance(new, TracedModule)
        new.__dict__.update(copy.deepcopy(self._kept(), memo))
        type(new).__name__ = type(self).__name__
        return new

    def _kept(self) -> dict[str, Any]:
        """What a plain GraphModule forgets."""
        parts = (*STATE, *_HOOKS, "training", "_root", "_plain", *self.__dict__.get("_plain", ()))
        return {part: self.__dict__[part] for part in parts if part in self.__dict__}

    def __reduce__(self) -> Any:
        kind = next(base for base in type(self).__mro__ if "<locals>" not in base.__qualname__)
        return _restore, (kind, type(self).__name__, super().__reduce__()[1], self._kept())


def _restore(kind: type[TracedModule], name: str, arguments: Any, kept: dict[str, Any]) -> TracedModule:
    plain = reduce_graph_module(*arguments)
    assert isinstance(plain, fx.GraphModule)
    module = kind(plain, plain.graph, name)
    for passing in (plain, _CodeOnlyModule):  # torch.fx reads the pickled source through one, to write the other
        _forget_source(passing.forward.__code__.co_filename)
    module.__dict__.update(kept)
    return module


class TwoGraphModule(_LikeRoot):
    """One state, two graphs: a call runs `graph_module(self.training)`."""

    def __init__(self, root: nn.Module, training_graph: fx.Graph, eval_graph: fx.Graph) -> None:
        super().__init__()
        _share_state(root, self)
        name = type(root).__name__
        parts = [TracedModule(root, graph, name) for graph in (eval_graph, training_graph)]
        self.__dict__["_parts"] = parts
        self.follow(root)

    def graph_module(self, training: bool) -> fx.GraphModule:
        """The graph for that mode, over this module's state."""
        part: fx.GraphModule = self.__dict__["_parts"][training]
        return part

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        scales = functional_scales(self.__dict__["_parts"])
        return super()._apply(keeping_float32(fn, scales), recurse)  # type: ignore[no-untyped-call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the traced model in the present mode."""
        part = self.graph_module(self.training)
        part.training = self.training
        return part.forward(*args, **kwargs)  # not a call: an outer trace knows no module of this name

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for part in self.__dict__["_parts"]:
            _share_state(self, part)


def _share_state(root: nn.Module, other: nn.Module) -> None:
    for part in STATE:
        other.__dict__[part] = root.__dict__[part]


def share_hooks(root: nn.Module, other: nn.Module) -> None:
    """Let a call of `other` run what is hooked to a call of `root`, which no trace holds."""
    for part in _HOOKS:
        other.__dict__[part] = root.__dict__[part]


def trace(root: nn.Module, concrete_args: dict[str, Any] | None = None) -> TracedModule | TwoGraphModule:
    """Trace `root` in training and in eval mode; the result shares its state and keeps its mode.

    Raises:
        ValueError: `torch.fx` cannot trace it; the message names the mode and the cause.
    """
    training, evaluation = (_trace(root, mode, concrete_args) for mode in (True, False))
    same = _code(training) == _code(evaluation)
    traced = TracedModule(root, evaluation) if same else TwoGraphModule(root, training, evaluation)
    share_hooks(root, traced)
    return traced


def trace_eval(root: nn.Module, concrete_args: dict[str, Any] | None = None) -> TracedModule:
    """Trace `root` in eval mode alone; the result shares its state.

    Raises:
        ValueError: `torch.fx` cannot trace it; the message names the cause.
    """
    traced = TracedModule(root, _trace(root, False, concrete_args))
    share_hooks(root, traced)
    return traced


def _trace(root: nn.Module, training: bool, concrete_args: dict[str, Any] | None) -> fx.Graph:
    modes = [(module, module.training) for module in root.modules()]
    root.train(training)
    try:
        with values_are_tensors():
            graph = Tracer().trace(root, concrete_args)
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr") and (why := why_no_target(str(node.target))):
                raise ValueError(why)
        return graph
    except Exception as error:
        asked = "training" if training else "eval"
        cause = str(error).partition(". ")[0]  # torch.fx goes on with advice
        raise ValueError(f"{type(root).__name__} cannot be traced by torch.fx in {asked} mode: {cause}") from error
    finally:
        for module, mode in modes:
            module.training = mode


def why_no_target(name: str) -> str | None:
    """Why no node of a graph can call what has this dotted name, as a sentence, or None where one can."""
    first, *_ = parts = name.split(".")
    if any(map(keyword.iskeyword, parts)):
        return f"{name!r} holds a word of Python's own, for which torch.fx writes no code"
    if first in _taken():
        return f"graph modules have a name {first!r} of their own, which hides {name!r}"
    return None


@cache
def _taken() -> frozenset[str]:
    """Names that graph modules need for themselves; "of" and "runner" are those of converted ones."""
    own = {"_parts", "of", "runner"}
    kinds = TracedModule(nn.Module(), fx.Graph()), TwoGraphModule
    return frozenset(name for kind in kinds for name in dir(kind)) - frozenset(dir(nn.Module())) | own


def _code(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's, DataParallel's and DistributedDataParallel's wrappers.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    while True:
        modules = model.__dict__.get("_modules", {})
        inner = modules["_orig_mod"] if "_orig_mod" in modules else None  # noqa: SIM401  (no get when scripted)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def graph_modules(model: nn.Module) -> Iterator[tuple[str, fx.GraphModule]]:
    """(prefix, graph module) for every graph in `model`; two with one prefix where the modes differ."""
    for name, module in unwrap(model).named_modules():
        if isinstance(module, TwoGraphModule):
            yield name, module.graph_module(False)
            yield name, module.graph_module(True)
        elif isinstance(module, fx.GraphModule):
            yield name, module
