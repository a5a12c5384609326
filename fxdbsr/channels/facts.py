"""An operation as its rule sees it, and what rules may note: ties, pins, edits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from fxdbsr.channels.values import OPAQUE, Folded, Parts, Value
from fxdbsr.graph import called_module


class Op:
    """A node whose arguments are known values: `args` and `kwargs` hold what is known in the place of nodes."""

    def __init__(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        def known(argument: fx.Node) -> Any:
            found = values.get(argument)
            return OPAQUE if found is None else found

        self.node = node
        self.module: nn.Module | None = called_module(node)
        self.args: tuple[Any, ...] = fx.node.map_arg(node.args, known)
        self.kwargs: dict[str, Any] = fx.node.map_arg(node.kwargs, known)

    @property
    def x(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else self.kwargs.get("input", OPAQUE)

    def get(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at `position` or of that name; a module's attribute of that name."""
        if self.module is not None:
            return getattr(self.module, name, default)
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    @property
    def name(self) -> str:
        """Of the function, the method, or the module's class."""
        if self.module is not None:
            return type(self.module).__name__
        return self.node.target if isinstance(self.node.target, str) else getattr(self.node.target, "__name__", "")

    @property
    def function(self) -> Callable[..., Any]:
        """What is called, as a function of tensors."""
        if self.module is not None:
            return self.module
        return getattr(torch.Tensor, self.node.target) if isinstance(self.node.target, str) else self.node.target


class Kept:
    """Which channels stay: `need[root[label]]`."""

    def __init__(self, need: Tensor, root: Tensor) -> None:
        self.need, self.root = need, root

    def flags(self, labels: Tensor) -> Tensor:
        """`[C]` bool, True for the channels of `labels` that stay."""
        return self.need[self.root[labels]]

    def positions(self, labels: Tensor) -> Tensor:
        """Positions in `labels` of the channels that stay."""
        return self.flags(labels).nonzero().flatten()

    def count(self, labels: Tensor) -> int:
        """Number of the channels that stay."""
        return int(self.flags(labels).sum())

    def whole(self, labels: Tensor) -> bool:
        """True where all of them stay."""
        return bool(self.flags(labels).all())


class Edit(Protocol):
    """A change of one operation, for when channels leave."""

    @property
    def node(self) -> fx.Node:
        """The operation."""

    def apply(self, kept: Kept, model: fx.GraphModule) -> None:
        """Change the graph; nothing where all channels of the operation stay."""


@dataclass
class Facts:
    """What is noted while values flow.

    Attributes:
        dtype: of all floating-point parameters; None where there are several.
        size: number of variables.
        ties: pairs of index tensors, entry by entry one variable.
        pinned: labels that stay, and why, as a sentence.
        edits: in order.
        frozen_memory: nodes that must stay views of what they read, because one is written in place.
        spared: (operation, argument), where the operation can do without the argument.
    """

    dtype: torch.dtype | None = None
    size: int = 0
    ties: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    pinned: list[tuple[Tensor, str]] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    frozen_memory: set[fx.Node] = field(default_factory=set)
    spared: set[tuple[fx.Node, Any]] = field(default_factory=set)

    def fresh(self, number: int) -> Tensor:
        """Labels of new variables."""
        self.size += number
        return torch.arange(self.size - number, self.size)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Let equally many labels stay or go together, one by one."""
        self.ties.append((a, b))

    def pin(self, value: Any, why: str) -> None:
        """Keep every channel of `value`."""
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, Value):
                self.pinned.append((part.labels, why))
            elif isinstance(part, Folded | Parts):
                self.pinned.append((part.value.labels, why))
