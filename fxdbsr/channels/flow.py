"""Every channel of every value of a model as one entry of a variable; which variables matter.

Operations that work on elements tie variables. A variable is needed where something reads it that cannot do
without: an operation without a rule, or a weight that is not zero, in a row that is itself needed, unless the
channel holds a constant that the reader's bias can absorb. What is not needed can leave every tensor that holds it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxdbsr.channels import sizes
from fxdbsr.channels.facts import Facts, Kept, Op
from fxdbsr.channels.layers import (
    CHANNELWISE,
    Link,
    constant_of,
    input_of,
    is_channelwise,
    is_layer,
    link_of,
    output_of,
)
from fxdbsr.channels.layout import cat
from fxdbsr.channels.nodes import frozen_modules, live_nodes, overwritten
from fxdbsr.channels.table import rule_of
from fxdbsr.channels.values import UNKNOWN, Folded, Size, Stored, Value
from fxdbsr.graph import called_module, get_attribute, writes_in_place
from fxdbsr.nn.shrink import whole_grid


@dataclass
class Flow:
    """Everything known of the channels of `model`, in eval mode.

    Attributes:
        values: of each node: a Value, a list of them, a size, or None where nothing is known.
        links: calls of layers, in order.
        channelwise: labels at each norm, or other module with a number for each channel, that may shrink.
        facts: ties, pins and edits.
        root: `[variables]`, the smallest variable that each one is tied to.
    """

    model: fx.GraphModule
    values: dict[fx.Node, Any] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    channelwise: dict[nn.Module, Tensor] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)

    def __post_init__(self) -> None:
        nodes = live_nodes(self.model.graph)
        self._live = set(nodes)
        self._frozen = frozen_modules(nodes)
        self._calls: Counter[int] = Counter()
        self._inputs: dict[int, Tensor | None] = {}
        self._outputs: dict[int, Tensor] = {}
        changing = overwritten(nodes)
        dtypes = {parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()}
        self.facts.dtype = dtypes.pop() if len(dtypes) == 1 else None
        self.facts.frozen_memory = changing
        self._calls.update(id(op.module) for op in (Op(node, {}) for node in nodes) if op.module is not None)
        for node in nodes:
            value = self._value(Op(node, self.values))
            if isinstance(value, Value) and node in changing:
                value = value.holding(torch.full_like(value.constant, UNKNOWN))
            self.values[node] = value
        self.root = components(self.facts.size, self.facts.ties)

    def _value(self, op: Op) -> Any:
        node, module = op.node, op.module
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            found = get_attribute(self.model, str(node.target))
            return Stored(found) if isinstance(found, Tensor) else None
        if sizes.reads_sizes(node):
            return sizes.read_sizes(op, self.facts, self._live)
        if sizes.reads_no_channels(node):
            return sizes.rank_of(op)
        number = sizes.computed(op)
        if number is not None:
            return number
        why = self._frozen.get(id(module))
        if why is None and is_layer(module):
            return self._layer(op)
        if why is None and is_channelwise(module, op.x):
            return self._channelwise(op)
        if type(module) in CHANNELWISE:
            self._share(module, None)
        rule = None if why else rule_of(node, module)
        value = None if rule is None else rule(op, self.facts)
        if value is None:
            what = "the model's output" if node.op == "output" else f"{node} ({why or 'no rule for it'})"
            for source in node.all_input_nodes:
                self.facts.pin(self.values.get(source), f"{what} reads them")
        return value

    def _input(self, node: fx.Node) -> Value | None:
        """The model's input `node`, where a conv that reads it says how many channels it has; all of them stay."""
        for user in node.users:
            layer = called_module(user)
            if layer is None or not is_layer(layer) or isinstance(layer, nn.Linear) or user.args != (node,):
                continue
            whole = whole_grid(layer)
            labels = self.facts.fresh(whole.in_channels)
            self.facts.pinned.append((labels, "the model is given them"))
            batch, *sides = (Size(node.name, axis) for axis in (0, *range(2, 2 + len(whole.kernel_size))))
            unknown = torch.full((len(labels),), UNKNOWN, dtype=torch.float64)
            return Value(labels, unknown, 1, (batch, len(labels), *sides))
        return None

    def _layer(self, op: Op) -> Value:
        layer = op.module
        assert layer is not None
        whole = whole_grid(layer)
        known = input_of(layer, op.x, whole.in_channels)
        if known is None:
            self.facts.pin(op.x, "a layer reads them along an axis that is not known")
        self._share(layer, None if known is None else known.labels)
        if id(layer) not in self._outputs:
            self._outputs[id(layer)] = self.facts.fresh(whole.out_channels)
        link = link_of(layer, known, self._outputs[id(layer)], self._calls[id(layer)])
        self.links.append(link)
        return output_of(link, op.x, str(op.node.args[0]), op.node.name)

    def _channelwise(self, op: Op) -> Value:
        module, x = op.module, op.x
        assert module is not None
        self._share(module, x.labels)
        self.channelwise[module] = x.labels
        if isinstance(module, nn.GroupNorm):
            sets = x.labels.view(module.num_groups, -1)
            self.facts.tie(sets[:, :1].expand_as(sets).flatten(), sets.flatten())
        found: Value = x.holding(constant_of(module, x.constant))
        return found

    def _share(self, module: Any, labels: Tensor | None) -> None:
        """Tie the inputs of all calls of `module`; where one is not known, all channels stay."""
        first = self._inputs.setdefault(id(module), labels)
        if first is not None and labels is not None:
            self.facts.tie(first, labels)
        elif first is not labels:
            for known in (first, labels):
                if known is not None:
                    self.facts.pinned.append((known, "a layer that reads them is called on other values, too"))

    def needed(self) -> Tensor:
        """`[variables]` bool: what must stay."""
        need = torch.zeros(self.facts.size, dtype=torch.bool)
        for labels, _ in self.facts.pinned:
            need[self.root[labels]] = True
        self.spread(need)
        return need

    def spread(self, need: Tensor) -> None:
        """Mark in `need`, in place, all that the needed channels read, and one channel of every value that stays."""
        kept = -1
        while kept != (kept := int(need.sum())):
            for link in reversed(self.links):
                link.spread(need, self.root)
            gone = self.gone(need)
            for node, value in self.values.items():
                if isinstance(value, Value) and node not in gone and not need[self.root[value.labels]].any():
                    need[self.root[value.labels[0]]] = True

    def gone(self, need: Tensor) -> set[fx.Node]:
        """Nodes that hold no needed channel, and that nothing reads which stays and cannot do without."""
        gone: set[fx.Node] = set()
        for node, value in reversed(self.values.items()):
            parts = value if isinstance(value, list) else [value.value if isinstance(value, Folded) else value]
            if not all(isinstance(part, Value) for part in parts) or writes_in_place(node):
                continue
            if any(need[self.root[part.labels]].any() for part in parts):
                continue
            if all(user in gone or self._spares(user, node) for user in node.users if user in self._live):
                gone.add(node)
        return gone

    def _spares(self, user: fx.Node, node: fx.Node) -> bool:
        """True where `user` does without `node` when no channel of it is needed."""
        if (user, node) in self.facts.spared:
            return user.args.count(node) == 1
        return rule_of(user, called_module(user)) is cat and isinstance(self.values[user], Value)

    def kept(self, need: Tensor) -> Kept:
        """`need` as questions about labels."""
        return Kept(need, self.root)


def components(size: int, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The smallest variable that each variable is tied to, over `pairs` of equally long index tensors.

    >>> components(4, [(torch.tensor([3]), torch.tensor([1])), (torch.tensor([1]), torch.tensor([2]))])
    tensor([0, 1, 1, 1])
    """
    root = torch.arange(size)
    if not pairs:
        return root
    a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
    while True:
        low = torch.minimum(root[a], root[b])
        new = root.clone()
        for side in (a, b):
            new.scatter_reduce_(0, root[side], low, "amin")
        new = new[new]
        if torch.equal(new, root):
            return root
        root = new
