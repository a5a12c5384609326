"""Which channels of a traced model matter: constants followed forward, readers followed backward.

Every channel of every value is one entry of a variable; elementwise operations tie variables. A variable is
needed where something reads it that cannot do without: an operation without a rule, or a weight that is not
zero, in a row that is itself needed, unless the channel holds a constant that the reader's bias can absorb.
What is not marked needed can leave every tensor that holds it. See `fxdbsr.channel_rules` for the operations.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxdbsr.channel_nodes import NORMS, frozen_modules, is_layer, is_norm, live_nodes, overwritten
from fxdbsr.channel_rules import rule_of
from fxdbsr.channel_values import UNKNOWN, Ties, Value, is_shape
from fxdbsr.graph import called_module
from fxdbsr.nn.shrink import from_constants, ignores_border, norm_constant, out_in, whole_grid
from fxdbsr.shuffles import shuffle


@dataclass
class Link:
    """One call of a layer.

    Attributes:
        layer: the conv or linear layer.
        input: the value that it reads, one label for each of its input channels; None where not known.
        output: labels of its output channels.
        constant: `[O]` float64, what they hold, NaN where not known.
        reads: `[O, I]` bool, the weights that are not zero, but for constants that the bias can absorb; None
            where channels go in whole groups, which ties say.
    """

    layer: nn.Module
    input: Value | None
    output: Tensor
    constant: Tensor
    reads: Tensor | None


@dataclass
class Flow:
    """Everything known of the channels of `model`, in eval mode.

    Attributes:
        values: of each node: a Value, a list of values, or None where channels are not known.
        links: calls of layers, in order.
        norms: labels at each batch norm that may shrink.
        pinned: labels that stay, and why, as a sentence.
    """

    model: fx.GraphModule
    values: dict[fx.Node, Any] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    norms: dict[Any, Tensor] = field(default_factory=dict)
    pinned: list[tuple[Tensor, str]] = field(default_factory=list)
    ties: Ties = field(default_factory=lambda: Ties([]))
    size: int = 0

    def __post_init__(self) -> None:
        nodes = live_nodes(self.model.graph)
        self._live = set(nodes)
        self._frozen = frozen_modules(nodes)
        self._calls = Counter(id(m) for n in nodes if (m := called_module(n)) is not None)
        self._inputs: dict[int, Tensor | None] = {}
        self._outputs: dict[int, Tensor] = {}
        changing = overwritten(nodes)
        for node in nodes:
            value = self._value(node)
            if isinstance(value, Value) and node in changing:
                value = value.holding(torch.full_like(value.constant, UNKNOWN))
            self.values[node] = value
        self.root = components(self.size, self.ties.pairs)

    def _value(self, node: fx.Node) -> Any:
        module = called_module(node)
        args = list(fx.node.map_arg(node.args, self.values.get))
        if is_shape(node) or (node.op == "call_method" and node.target == "size"):
            return self._size(node, args[0])
        why = self._frozen.get(id(module))
        if module is not None and why is None and is_layer(module):
            return self._layer(module, args[0])
        if module is not None and why is None and is_norm(module, args[0]):
            return self._norm(module, args[0])  # type: ignore[arg-type]
        if type(module) in NORMS:
            self._share(self._inputs, module, None)  # type: ignore[arg-type]
        rule = None if why else rule_of(node)
        if node.target is shuffle and isinstance(args[0], Value):
            return self._shuffled(args[0], args[1])
        value = None if rule is None else rule(node, args, self.ties)
        if value is None:
            what = "the model's output" if node.op == "output" else f"{node} ({why or 'no rule for it'})"
            for source in node.all_input_nodes:
                self.pin(self.values.get(source), f"{what} reads them")
        return value

    def _shuffled(self, x: Value, groups: int) -> Value | None:
        if x.axis == 1 and not x.flat and len(x.labels) % groups == 0:
            return x.take(shuffle(torch.arange(len(x.labels))[None], groups)[0])
        self.pin(x, f"a shuffle in {groups} groups reads them")
        return None

    def pin(self, value: Any, why: str) -> None:
        """Keep every channel of `value`."""
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Value):
                self.pinned.append((part.labels, why))

    def _size(self, node: fx.Node, x: Any) -> None:
        """Sizes of axes other than the channels' may be read."""
        whole = is_shape(node)
        for user in [u for u in node.users if u in self._live] if whole else [node]:
            index = user.args[1] if len(user.args) == 2 and (not whole or user.target is operator.getitem) else None
            if isinstance(x, Value) and not _spares_channels(x, index):
                self.pin(x, f"{user} reads their number")

    def _layer(self, layer: nn.Module, x: Any) -> Value:
        weight = out_in(layer)
        sizes = whole_grid(layer)
        known = self._input_of(layer, x, sizes.in_channels)
        if known is None:
            self.pin(x, "a layer reads them along an axis that is not known")
        self._share(self._inputs, layer, known)
        if id(layer) not in self._outputs:
            self._outputs[id(layer)] = torch.arange(self.size, self.size + sizes.out_channels)
            self.size += sizes.out_channels
        labels = self._outputs[id(layer)]
        nonzero = (weight.ne(0).flatten(2).any(2) if weight.dim() > 2 else weight.ne(0)).cpu()
        held = torch.full((sizes.in_channels,), UNKNOWN, dtype=torch.float64) if known is None else known.constant
        if not ignores_border(layer):
            held = held.where(held == 0, UNKNOWN)
        by_group = held.view(sizes.groups, -1)
        moving = (nonzero.unflatten(0, (sizes.groups, -1)) & by_group.isnan()[:, None]).any(2).flatten()
        constant = from_constants(layer, by_group.nan_to_num()).masked_fill(moving, UNKNOWN)
        if isinstance(layer.bias, Tensor):
            constant += layer.bias.detach().double().cpu()
        reads = None
        if sizes.groups == 1:
            absorbed = held == 0 if self._calls[id(layer)] > 1 else ~held.isnan()
            reads = nonzero & ~absorbed
        elif known is None:
            self.pinned.append((labels, "the channels of a grouped conv's input are not known"))
        else:
            self._tie_groups(known.labels, labels, sizes.groups)
        self.links.append(Link(layer, known, labels, constant, reads))
        taps = weight.dim() - 2
        rank = taps + 2 if taps else (x.rank if isinstance(x, Value) else None)
        return Value(labels, constant, 1 if taps or rank == 2 else -1, rank)

    def _input_of(self, layer: nn.Module, x: Any, channels: int) -> Value | None:
        """`x` with one label for each input channel of `layer`, or None where they cannot be told."""
        if not isinstance(x, Value):
            return None
        if isinstance(layer, nn.Linear):
            if not (x.axis == -1 or x.rank == 2) or channels % len(x.labels):
                return None
            times = channels // len(x.labels)
            if times > 1 and not x.flat:
                return None
            return x.take(torch.arange(len(x.labels)).repeat_interleave(times))
        fits = x.axis == 1 and x.rank == out_in(layer).dim() and not x.flat and len(x.labels) == channels
        return x if fits else None

    def _share(self, store: dict[int, Tensor | None], module: nn.Module, x: Value | None) -> None:
        """Tie the inputs of all calls of `module`; where one is not known, all channels stay."""
        labels = None if x is None else x.labels
        first = store.setdefault(id(module), labels)
        if first is not None and labels is not None:
            self.ties.pairs.append((first, labels))
        elif first is not labels:
            for known in (first, labels):
                if known is not None:
                    self.pinned.append((known, "a layer that reads them is called on other values, too"))

    def _tie_groups(self, inputs: Tensor, outputs: Tensor, groups: int) -> None:
        heads = inputs.view(groups, -1)[:, :1]
        for labels in (inputs.view(groups, -1), outputs.view(groups, -1)):
            self.ties.pairs.append((heads.expand_as(labels).flatten(), labels.flatten()))

    def _norm(self, norm: Any, x: Value) -> Value:
        self._share(self._inputs, norm, x)
        self.norms[norm] = x.labels
        return x.holding(norm_constant(norm, x.constant))

    def needed(self) -> Tensor:
        """`[variables]` bool: what must stay; ask with `needed[flow.root[labels]]`."""
        need = torch.zeros(self.size, dtype=torch.bool)
        for labels, _ in self.pinned:
            need[self.root[labels]] = True
        self.spread(need)
        return need

    def spread(self, need: Tensor) -> None:
        """Mark in `need` all that the needed channels read, and one channel of every value, in place."""
        kept = -1
        while kept != (kept := int(need.sum())):
            for link in reversed(self.links):
                if link.reads is not None and link.input is not None:
                    read = link.reads[need[self.root[link.output]]].any(0)
                    need[self.root[link.input.labels[read]]] = True
            for value in self.all_values():
                roots = self.root[value.labels]
                if not need[roots].any():
                    need[roots[0]] = True

    def all_values(self) -> Iterator[Value]:
        """Every value with known channels, in order."""
        for value in self.values.values():
            yield from (v for v in (value if isinstance(value, list) else [value]) if isinstance(v, Value))

    def keeps(self, need: Tensor, labels: Tensor) -> Tensor:
        """Positions of `labels` that stay."""
        return need[self.root[labels]].nonzero().flatten()


def _spares_channels(x: Value, index: Any) -> bool:
    """True where `x.shape[index]` does not hold the number of channels."""
    if x.rank is None or not isinstance(index, int | slice):
        return False
    read = range(x.rank)[index]
    return x.axis % x.rank not in ((read,) if isinstance(read, int) else read)


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
