"""Calls of a plan: memory and arguments for each, and what torch runs in between."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxdbsr.graph import get_attribute
from fxdbsr.network.memory import PAGE
from fxdbsr.network.plan import Plan, Run

SPARE = 8  # memories for calls that a plan keeps
CHUNK = 8  # images that are taken at a time where a batch has more


class UnplannedError(Exception):
    """A value has another shape than in the call that the plan was made from."""


class Memory:
    """The arena and the arguments for one call of a plan at a time."""

    def __init__(self, plan: Plan, modules: Mapping[str, nn.Module]) -> None:
        self.plan, self.modules = plan, modules
        whole = torch.zeros(plan.bytes + PAGE, dtype=torch.uint8)
        self.arena = whole[-whole.data_ptr() % PAGE :]
        self.calls = {
            index: item.program.call([self.arena.data_ptr(), *[0] * len(item.outside)])
            for index, item in enumerate(plan.items)
            if isinstance(item, Run) and item.program is not None
        }
        self.views: dict[fx.Node, Tensor] = {}
        for node, buffer in plan.buffers.items():
            if not buffer.outside and node in plan.operations and any(u not in plan.operations for u in node.users):
                image = plan.images[node]
                count = plan.batch * image.channels * image.size[0] * image.size[1] * plan.dtype.itemsize
                start = self.arena[buffer.offset : buffer.offset + count].view(plan.dtype)
                self.views[node] = image.tensor(start.view(plan.batch, *image.size, image.channels))

    def run(self, values: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        """All items of the plan, given its inputs and the tensors for its outputs; the values that torch saw.

        Raises:
            UnplannedError: a value that torch made has another shape than it had.
        """
        plan, values, kept = self.plan, {**self.views, **values}, list[Tensor]()
        for index, item in enumerate(plan.items):
            if isinstance(item, fx.Node):
                values[item] = run_node(item, values, self.modules)
                continue
            for number, node in enumerate(plan.outside_nodes(item), 1):
                x = values[node]
                image = plan.images[node]
                if x.shape != image.shape(plan.batch) or x.dtype != plan.dtype:
                    raise UnplannedError
                if node.op != "placeholder":
                    x = x.contiguous() if image.flat else x.contiguous(memory_format=torch.channels_last)
                    kept.append(x)
                self.calls[index].set(number, x.data_ptr())
            self.calls[index].run()
        return values

    def owns(self, tensor: Tensor) -> bool:
        """True where `tensor` lies in the arena."""
        return tensor.untyped_storage().data_ptr() == self.arena.untyped_storage().data_ptr()


def run_node(node: fx.Node, values: Mapping[fx.Node, Any], modules: Mapping[str, nn.Module]) -> Any:
    """The value of a node that torch runs."""
    args = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_module":
        return modules[str(node.target)](*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    return get_attribute(node.graph.owning_module, str(node.target))  # type: ignore[arg-type]


class Planned:
    """Plans for one shape of input: for all of its images at once, or for a few at a time."""

    def __init__(self, plan: Plan, modules: Mapping[str, nn.Module]) -> None:
        self.batch, self.modules = plan.batch, modules
        self.chunk = CHUNK if plan.is_whole and plan.batch > CHUNK else plan.batch
        self.first = plan
        self.plans: dict[int, tuple[Plan, deque[Memory]]] = {}
        self.output = next(iter(reversed(plan.graph.nodes)))

    def __call__(self, inputs: Mapping[fx.Node, Any]) -> Any:
        """The output for these inputs."""
        values: dict[fx.Node, Any] = dict(inputs)
        made: dict[int, Tensor] = {}
        for node, buffer in self.first.buffers.items():
            if buffer.outside and node in self.first.operations:
                image = self.first.images[node]
                shape = (self.batch, *image.size, image.channels)
                if id(buffer) not in made:
                    made[id(buffer)] = torch.empty(shape, dtype=self.first.dtype)
                values[node] = image.tensor(made[id(buffer)])
        if self.chunk == self.batch:
            return self._part(self.batch, values)
        for start in range(0, self.batch, self.chunk):
            stop = min(start + self.chunk, self.batch)
            self._part(stop - start, {node: x[start:stop] for node, x in values.items()})
        return filled(self.output.args[0], values)

    def _part(self, size: int, values: dict[fx.Node, Any]) -> Any:
        if size not in self.plans:
            plan = self.first if size == self.batch else replace(self.first, batch=size, items=[], buffers={})
            self.plans[size] = (plan, deque(maxlen=SPARE))
        plan, free = self.plans[size]
        try:
            memory = free.pop()
        except IndexError:
            memory = Memory(plan, self.modules)
        seen = memory.run(values)
        output = filled(self.output.args[0], seen)
        if not plan.is_whole:
            output = map_tensors(output, lambda t: t.clone() if memory.owns(t) else t)
        free.append(memory)
        return output


def filled(argument: Any, values: Mapping[fx.Node, Any]) -> Any:
    """`argument` of a node with `values` in the place of nodes, in lists and dicts that the caller may change."""
    match argument:
        case fx.Node():
            return values[argument]
        case dict():
            return {key: filled(value, values) for key, value in argument.items()}
        case list():
            return [filled(value, values) for value in argument]
        case tuple():
            items = [filled(value, values) for value in argument]
            return type(argument)(*items) if hasattr(argument, "_fields") else tuple(items)
    return fx.node.map_arg(argument, values.__getitem__)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with each tensor in its tuples, lists and dicts replaced."""
    return pytree.tree_map_only(Tensor, function, value)
