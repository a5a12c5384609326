"""Which convs may lose all their blocks: those without which every output still depends on every input.

A conv without blocks is a constant. In the graph of evaluation, a value depends on an input if it can be
reached from it: through a sum or a concatenation along any of its terms, through everything else only while
all terms that depended on an input still do. That is right for products (a gate that has become constant,
attention), and on the safe side for functions that are not known here. Shapes and sizes carry no values; the
parts of a split tensor count as inputs of their own, so that channels that pass by do not excuse the others.

So a residual branch may die, and a shortcut conv may die, but never both; a conv on the only path never.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import fx, nn

from fxdbsr.graph import called_module, get_attribute
from fxdbsr.layers import BlockedLayer
from fxdbsr.nn.scaled import ScaledFunction, ScaledLayer
from fxdbsr.traced import TwoGraphModule, unwrap

SUMS = {
    operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, torch.cat, torch.concat,
    torch.concatenate, torch.stack, torch.hstack, torch.vstack, torch.maximum, torch.minimum,
    "add", "add_", "sub", "sub_", "maximum", "minimum",
}  # fmt: skip
SHAPES = {
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like,
    torch.numel, torch.is_tensor, len, isinstance, "size", "dim", "ndimension", "numel", "stride",
    "get_device", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "element_size",
    "is_contiguous",
}  # fmt: skip
ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "layout", "itemsize", "nbytes", "requires_grad"}


class Bypass:
    """Answers for a prepared model whether a set of its layers may lose all blocks.

    Args:
        model: prepared, also inside wrappers.
        layers: as `blocked_layers(model)` lists them; sets of layers are sets of positions in this list.
    """

    def __init__(self, model: nn.Module, layers: Sequence[BlockedLayer]) -> None:
        index = {id(layer.scale): position for position, layer in enumerate(layers)}
        self._paths = [_Paths(graph_module, index) for graph_module in _eval_graphs(unwrap(model))]
        on_paths = {layer for paths in self._paths for layer in paths.layers}
        in_training = {
            index[scale]
            for part in _training_graphs(unwrap(model))
            for node in part.graph.nodes
            if (scale := scale_of(node)) in index
        }
        self._unknown = frozenset(range(len(layers))) - on_paths - in_training
        self._known: dict[frozenset[int], bool] = {}

    def survives(self, dead: AbstractSet[int]) -> bool:
        """True where, with `dead` constant, every output still depends on all that it depended on."""
        key = frozenset(dead)
        if key not in self._known:
            if len(self._known) > 4096:
                self._known.clear()
            self._known[key] = not key & self._unknown and all(paths.survives(key) for paths in self._paths)
        return self._known[key]


class _Paths:
    """What one graph's outputs depend on; nodes with one argument are left out.

    A step is (layer or -1, whether all sources are needed, its own bit, sources); its value is the set of
    inputs and parts of split tensors that it depends on, as the bits of an int. The first places are inputs.
    """

    def __init__(self, model: fx.GraphModule, index: dict[int, int]) -> None:
        self.layers: set[int] = set()
        self._inputs = 0
        self._steps: list[tuple[int, bool, int, tuple[int, ...]]] = []
        self._outputs: tuple[int, ...] = ()
        place: dict[fx.Node, int] = {}
        inputs = [node for node in model.graph.nodes if node.op == "placeholder"]
        self._inputs = len(inputs)
        place.update({node: number for number, node in enumerate(inputs)})
        for node in model.graph.nodes:
            if node.op in ("placeholder", "get_attr") or carries_no_values(node):
                continue
            sources = tuple(dict.fromkeys(place[a] for a in node.all_input_nodes if a in place))
            if node.op == "output":
                self._outputs = sources
                continue
            if not sources:
                continue
            layer = index.get(scale_of(node), -1)
            part = node.target is operator.getitem
            if layer < 0 and len(sources) == 1 and not part:
                place[node] = sources[0]
                continue
            if layer >= 0:
                self.layers.add(layer)
            place[node] = self._inputs + len(self._steps)
            own = 1 << place[node] if part else 0
            self._steps.append((layer, node.target not in SUMS, own, sources))
        self._before = self._reached(frozenset())

    def survives(self, dead: frozenset[int]) -> bool:
        if not self._outputs:
            return not dead & self.layers
        return self._reached(dead) == self._before

    def _reached(self, dead: frozenset[int]) -> list[int]:
        values = [1 << number for number in range(self._inputs)]
        for layer, needs_all, own, sources in self._steps:
            reached = [values[source] for source in sources]
            value = 0
            if layer not in dead and (all(reached) if needs_all else any(reached)):
                value = own
                for one in reached:
                    value |= one
            values.append(value)
        return [values[source] for source in self._outputs]


def scale_of(node: fx.Node) -> int:
    """id of the scale of the blocked layer that `node` calls, or 0."""
    layer = called_module(node)
    if isinstance(layer, ScaledLayer):
        return id(layer.scale)
    if isinstance(layer, ScaledFunction) and node.graph.owning_module is not None:
        return id(get_attribute(node.graph.owning_module, str(node.args[2].target)))  # type: ignore[union-attr]
    return 0


def carries_no_values(node: fx.Node) -> bool:
    """True where the result of `node` depends on shapes and types of its arguments alone."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ATTRIBUTES
    return node.op in ("call_function", "call_method") and node.target in SHAPES


def _eval_graphs(root: nn.Module) -> list[fx.GraphModule]:
    parts = [module for module in root.modules() if isinstance(module, fx.GraphModule | TwoGraphModule)]
    return [part.graph_module(False) if isinstance(part, TwoGraphModule) else part for part in parts]


def _training_graphs(root: nn.Module) -> list[fx.GraphModule]:
    return [module.graph_module(True) for module in root.modules() if isinstance(module, TwoGraphModule)]
