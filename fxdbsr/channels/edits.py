"""How an operation changes when channels leave the tensors that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from fxdbsr.channels.facts import Kept
from fxdbsr.graph import replace

Path: TypeAlias = tuple[int | str, ...]  # of an argument: (1,) is args[1], (1, 0) its first entry, ("size",) a keyword


@dataclass(frozen=True)
class SetNumber:
    """The argument of `node` at `path`, which counts the channels `labels` times `factor`, counts what is left."""

    node: fx.Node
    path: Path
    labels: Tensor
    factor: int = 1

    def apply(self, kept: Kept, model: fx.GraphModule) -> None:
        """See the class."""
        if not kept.whole(self.labels):
            set_argument(self.node, self.path, self.factor * kept.count(self.labels))


@dataclass(frozen=True)
class KeepNumber:
    """`node` reads how many channels `labels` are, for arithmetic of the model's own: the number that it was."""

    node: fx.Node
    labels: Tensor

    def apply(self, kept: Kept, model: fx.GraphModule) -> None:
        """See the class."""
        if kept.whole(self.labels):
            return
        number = len(self.labels)

        def literal(argument: fx.Node) -> Any:
            return number if argument is self.node else argument

        for user in list(self.node.users):
            user.args, user.kwargs = fx.node.map_arg(user.args, literal), fx.node.map_arg(user.kwargs, literal)


@dataclass(frozen=True)
class Split:
    """x.chunk(2, axis), or another cut into `parts` -> torch.split(x, sizes, axis), with what is left of each."""

    node: fx.Node
    parts: list[Tensor]
    axis: int

    def apply(self, kept: Kept, model: fx.GraphModule) -> None:
        """See the class."""
        if all(kept.whole(labels) for labels in self.parts):
            return
        sizes = [kept.count(labels) for labels in self.parts]
        with self.node.graph.inserting_before(self.node):
            new = self.node.graph.call_function(torch.split, (first_argument(self.node), sizes, self.axis))
        replace(self.node, new)


@dataclass(frozen=True)
class Pick:
    """`node` takes the channels `index` of what `entry` reads, whose channels are `labels`: those that are left.

    A slice where they are neighbours and in order, `torch.index_select` otherwise. `entry` is the first of the nodes
    that lead to `node`, or itself.
    """

    node: fx.Node
    entry: fx.Node
    labels: Tensor
    index: Tensor
    axis: int

    def apply(self, kept: Kept, model: fx.GraphModule) -> None:
        """See the class."""
        if kept.whole(self.labels):
            return
        place = torch.zeros(len(self.labels), dtype=torch.int64)
        stays = kept.positions(self.labels)
        place[stays] = torch.arange(len(stays))
        index = place[self.index[kept.positions(self.labels[self.index])]]
        graph = self.node.graph
        with graph.inserting_before(self.node):
            if bool((index.diff() == 1).all()):
                arguments = (first_argument(self.entry), self.axis, int(index[0]), len(index))
                new = graph.call_function(torch.narrow, arguments)
            else:
                order = add_buffer(model, f"{self.node.name}_order", index)
                new = graph.call_function(torch.index_select, (first_argument(self.entry), self.axis, order))
        replace(self.node, new)


@dataclass(frozen=True)
class SetPlace:
    """The argument of `node` at `path`, the position of one of the channels `labels`, counts those that are left."""

    node: fx.Node
    path: Path
    labels: Tensor
    position: int

    def apply(self, kept: Kept, model: fx.GraphModule) -> None:
        """See the class."""
        if not kept.whole(self.labels):
            set_argument(self.node, self.path, kept.count(self.labels[: self.position]))


@dataclass(frozen=True)
class UseConstant:
    """The argument of `node` at `position` holds `constant [C]` everywhere: a tensor of the model takes its place.

    The channels of the result are `labels`, along `axis` of `rank`. It broadcasts: a single image has no axis before.
    """

    node: fx.Node
    position: int
    labels: Tensor
    constant: Tensor
    axis: int
    rank: int

    def apply(self, kept: Kept, model: fx.GraphModule) -> None:
        """See the class."""
        held = self.constant[kept.positions(self.labels)]
        held = held.view([-1, *[1] * (self.rank - 1 - self.axis)])
        with self.node.graph.inserting_before(self.node):
            set_argument(self.node, (self.position,), add_buffer(model, f"{self.node.name}_constant", held))


@dataclass(frozen=True)
class DropEmpty:
    """torch.cat(tensors) -> torch.cat of those that have channels left; the channels of each are `parts`."""

    node: fx.Node
    parts: list[Tensor]

    def apply(self, kept: Kept, model: fx.GraphModule) -> None:
        """See the class."""
        path: Path = (0,) if self.node.args else ("tensors",)
        given = self.node.args[0] if self.node.args else self.node.kwargs["tensors"]
        assert isinstance(given, Sequence)
        left = [tensor for tensor, part in zip(given, self.parts, strict=True) if kept.count(part)]
        if len(left) < len(given):
            set_argument(self.node, path, left)


@dataclass(frozen=True)
class CutStored:
    """The argument of `node` at `path`, a tensor of the model, loses along `axis` what left `labels`."""

    node: fx.Node
    path: Path
    tensor: Tensor
    labels: Tensor
    axis: int

    def apply(self, kept: Kept, model: fx.GraphModule) -> None:
        """See the class."""
        if kept.whole(self.labels):
            return
        left = self.tensor.detach().index_select(self.axis, kept.positions(self.labels).to(self.tensor.device))
        with self.node.graph.inserting_before(self.node):
            set_argument(self.node, self.path, add_buffer(model, f"{self.node.name}_tensor", left))


def add_buffer(model: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    """Register `tensor` under a free name like `name`, on the model's device; the node that reads it."""
    while hasattr(model, name):
        name = f"{name}_"
    device = next((parameter.device for parameter in model.parameters()), tensor.device)
    model.register_buffer(name, tensor.to(device))
    return model.graph.get_attr(name)


def set_argument(node: fx.Node, path: Path, value: Any) -> None:
    """Overwrite the argument of `node` at `path`."""
    head, *rest = path
    if isinstance(head, str):
        node.kwargs = {**node.kwargs, head: _with(node.kwargs[head], rest, value)}
    else:
        node.args = tuple(_with(a, rest, value) if i == head else a for i, a in enumerate(node.args))


def _with(container: Any, path: list[int | str], value: Any) -> Any:
    if not path:
        return value
    head, *rest = path
    return tuple(_with(item, rest, value) if i == head else item for i, item in enumerate(container))


def first_argument(node: fx.Node) -> Any:
    """What `node` reads first."""
    return node.args[0] if node.args else node.kwargs["input"]
