"""Runs a converted model: on a CPU by plans for the shapes that it meets, on a GPU with pools inside of convs.

The graph stays an ordinary graph of packed convs and runs as one wherever something looks at it: gradients, hooks,
compilers, modes, tracers. Else on a CPU the first call with inputs of a shape makes a plan, from shapes alone, and
follows it; on a GPU the forward is that of `fxdbsr.network.pooled`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fxdbsr.graph import called_module, get_attribute, writes_in_place
from fxdbsr.kernels import cpu_program, jit
from fxdbsr.kernels.cpu_layout import Layout
from fxdbsr.kernels.ops import is_watched
from fxdbsr.network.calls import Planned, UnplannedError
from fxdbsr.network.operations import image_of, operations_of, pools_in_convs
from fxdbsr.network.plan import Plan
from fxdbsr.network.pooled import pooled_forward
from fxdbsr.network.weights import Weights, conv_weights, linear_weights
from fxdbsr.nn.packed import PackedConv

PLANS = 16  # of different shapes that a model keeps


class Recorder(fx.Interpreter):
    """Runs a graph and notes the shape of each value, and which values share memory with what they were made from."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, Any] = {}
        self.aliases: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        """As the interpreter."""
        before = [tensor for source in n.all_input_nodes for tensor in pytree.tree_leaves(self.env[source])]
        value = super().run_node(n)
        for tensor in pytree.tree_leaves(value):
            if isinstance(tensor, Tensor) and any(isinstance(b, Tensor) and same_memory(tensor, b) for b in before):
                self.aliases.add(n)
        self.seen[n] = value
        return value


def same_memory(a: Tensor, b: Tensor) -> bool:
    """True where one tensor may be a view of the other."""
    return bool(torch._C._is_alias_of(a, b))  # type: ignore[attr-defined]


def recorded(module: fx.GraphModule, args: tuple[Tensor, ...]) -> Recorder:
    """What `module` does with tensors like `args`, told by shapes alone: nothing is computed or written."""
    recorder = Recorder(module)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        recorder.run(*(mode.from_tensor(x) for x in args))
    return recorder


def may_keep(node: fx.Node) -> bool:
    """True where `node` calls code from outside of torch, which may keep what it reads."""
    if node.op == "call_method":
        return False
    owner = node.graph.owning_module
    target: Any = type(owner.get_submodule(str(node.target))) if node.op == "call_module" and owner else node.target
    module = getattr(target, "__module__", None) or "builtins"
    return module.split(".")[0] not in ("torch", "_operator", "builtins", "math", "fxdbsr")


class Runner:
    """What a converted model remembers of its calls; none of it is state, copied or saved."""

    def __init__(self, module: fx.GraphModule) -> None:
        nodes = list(module.graph.nodes)
        self.inputs = [node for node in nodes if node.op == "placeholder"]
        self.modules = {str(n.target): m for n in nodes if (m := called_module(n)) is not None}
        self.layers = [m for m in self.modules.values() if isinstance(m, PackedConv)]
        self.linears = [m for m in self.modules.values() if type(m) is nn.Linear]  # plans hold copies of their weights
        self.owners = [(*owner_of(module, name), found) for name, found in self.modules.items()]
        self.constants = [get_attribute(module, str(n.target)) for n in nodes if n.op == "get_attr"]
        writes_input = any(writes_in_place(n) and set(n.all_input_nodes) & set(self.inputs) for n in nodes)
        foreign = any(may_keep(n) for n in nodes)  # code that should not run on shapes alone
        starred = any(str(n.target).startswith("*") for n in self.inputs)
        self.pooled = pooled_forward(module)
        self.usable = bool(self.inputs) and not writes_input and not foreign and not starred
        self.state: Any = None
        self.dtype: torch.dtype | None = None  # of the layers that the engine runs; None where it runs none
        self.plans: OrderedDict[Any, Planned] = OrderedDict()
        self.weights: dict[nn.Module, tuple[Any, Weights]] = {}

    def is_current(self) -> bool:
        """True while the graph calls the modules that it called when this was made."""
        return all(children.get(leaf) is found for children, leaf, found in self.owners)

    def may_run(self, args: tuple[Any, ...], module: nn.Module) -> bool:
        """True where nothing looks at the operations of this call, and a plan could serve it."""
        on_cpu = self.usable and all(type(x) is Tensor and x.is_cpu for x in args)
        return on_cpu and self._is_unseen(args, module, "cpu")

    def may_pool(self, args: tuple[Any, ...], module: nn.Module) -> bool:
        """True where nothing looks at the operations of this call, on a GPU, and a conv can take a pool's maxima."""
        on_gpu = self.pooled is not None and all(isinstance(x, Tensor) and x.is_cuda for x in args)
        return on_gpu and self._is_unseen(args, module, "cuda")

    def _is_unseen(self, args: tuple[Any, ...], module: nn.Module, device: str) -> bool:
        return (
            not module.training
            and len(args) == len(self.inputs) > 0
            and all(x.numel() > 0 for x in args)
            and not is_watched(*args)
            and not torch.is_autocast_enabled(device)
            and not nn.modules.module._has_any_global_hook()
            and not any(found._forward_hooks or found._forward_pre_hooks for found in self.modules.values())
            and not (torch.is_grad_enabled() and self._has_gradients())
        )

    def _has_gradients(self) -> bool:
        states = (state for m in self.modules.values() for state in (m._parameters, m._buffers))
        tensors = (t for state in states for t in state.values())
        return any(t is not None and t.requires_grad for t in tensors) or any(
            isinstance(t, Tensor) and t.requires_grad for t in self.constants
        )

    def run(self, module: fx.GraphModule, args: tuple[Tensor, ...]) -> tuple[bool, Any]:
        """(True, the output), or (False, None) where the graph should run as it is."""
        layouts = tuple(layout_of(x) for x in args)
        if None in layouts:
            return False, None
        for layer in self.layers:
            layer.refresh()
        packed = tuple(layer.revision for layer in self.layers)
        state = (packed, tuple(version_of(linear) for linear in self.linears))
        if state != self.state:
            self.state, self.plans = state, OrderedDict()
            self.dtype = next((layer.values.dtype for layer in self.layers if layer.engine == "cpu"), None)
        if self.dtype is None:
            return False, None
        threads = torch.get_num_threads() if cpu_program.is_parallel() else 1
        key = (tuple((x.shape, x.dtype) for x in args), layouts, threads)
        planned = self.plans.get(key)
        if planned is None:
            inputs = dict(zip(self.inputs, layouts, strict=True))
            planned = self.plans[key] = self._plan(module.graph, recorded(module, args), inputs, threads)
            while len(self.plans) > PLANS:
                self.plans.popitem(last=False)
        try:
            return True, planned(dict(zip(self.inputs, args, strict=True)))
        except UnplannedError:
            return False, None

    def _plan(self, graph: fx.Graph, recorder: Recorder, layouts: dict[fx.Node, Any], threads: int) -> Planned:
        first = recorder.seen[self.inputs[0]]
        batch, dtype, target = int(first.shape[0]), self.dtype, jit.host()
        assert dtype is not None
        assert target is not None
        found = {node: image_of(value, batch, dtype) for node, value in recorder.seen.items()}
        images = {node: image for node, image in found.items() if image is not None}
        aliases = frozenset(recorder.aliases)
        images, operations = pools_in_convs(images, operations_of(graph, images))
        inputs = {node: layout for node, layout in layouts.items() if node in images}
        options = (images, operations, aliases, inputs, batch, dtype, threads, target, self._weights)
        return Planned(Plan(graph, *options), self.modules)

    def _weights(self, layer: PackedConv | nn.Linear) -> Weights:
        version = layer.revision if isinstance(layer, PackedConv) else version_of(layer)
        if layer not in self.weights or self.weights[layer][0] != version:
            target = jit.host()
            assert target is not None
            found = conv_weights if isinstance(layer, PackedConv) else linear_weights
            self.weights[layer] = (version, found(layer, target))  # type: ignore[arg-type]
        return self.weights[layer][1]


def version_of(linear: nn.Linear) -> tuple[tuple[int, int], ...]:
    """What changes when a tensor of the layer is replaced, moved or written in place."""
    held = (linear.weight, linear.bias)
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in held if t is not None)


def owner_of(module: nn.Module, name: str) -> tuple[dict[str, nn.Module | None], str]:
    """The dict that holds the submodule `name`, and its key there."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path)._modules, leaf


def layout_of(x: Tensor) -> Layout | None:
    """The layout of the images in `x`; None where they lie neither channels last nor channels first."""
    if x.dim() == 2 and x.is_contiguous():
        return Layout.channels_last(x.shape[1], (1, 1))
    if x.dim() != 4:
        return None
    C, size = x.shape[1], (x.shape[2], x.shape[3])
    if x.is_contiguous(memory_format=torch.channels_last):
        return Layout.channels_last(C, size)
    return Layout(C, size, 1, 1) if x.is_contiguous() else None
