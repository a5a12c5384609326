"""Runs of channels that may change their order: which they are, and where they lie.

A run is what one conv gives, or several that are added. Its channels may be permuted where every value that holds
one of them holds the whole run, in order, and where nothing reads single channels by their position. Then all layers
that make or read the run are permuted with it, and the model computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fxdbsr.channels.edits import CutStored, Pick, SetPlace, Split, UseConstant
from fxdbsr.channels.flow import Flow
from fxdbsr.channels.layers import Link
from fxdbsr.channels.values import Folded, Parts, Value
from fxdbsr.nn.scaled import ScaledLayer


@dataclass
class Run:
    """Channels of one order.

    Attributes:
        roots: `[C]` the variable of each channel.
        unit: channels that move together, a row of blocks of each layer that makes the run.
        makers: the layers that make it.
    """

    roots: Tensor
    unit: int
    makers: list[Link] = field(default_factory=list)


class Runs:
    """The runs of `flow` that may be permuted, as numbers; -1 is none.

    Attributes:
        found: the runs.
        of, place: `[variables]`, the run of each variable and its position there.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.found: list[Run] = []
        self.of = torch.full((flow.facts.size,), -1)
        self.place = torch.zeros(flow.facts.size, dtype=torch.int64)
        for link in {id(link.layer): link for link in reversed(flow.links)}.values():
            if isinstance(link.layer, ScaledLayer) and link.groups == 1:
                self._add(link, link.layer.grid.block_size[0])
        self._forbid()

    def _add(self, link: Link, unit: int) -> None:
        """Note the run that `link` makes, where each channel is a variable of its own."""
        roots = self.flow.root[link.output]
        known = int(self.of[roots[0]])
        if known >= 0 and torch.equal(self.found[known].roots, roots) and self.found[known].unit == unit:
            self.found[known].makers.append(link)
        elif len(roots.unique()) < len(roots) or (self.of[roots] >= 0).any():
            self._drop(roots)
        else:
            self.of[roots], self.place[roots] = len(self.found), torch.arange(len(roots))
            self.found.append(Run(roots, unit, [link]))

    def _drop(self, roots: Tensor) -> None:
        """Forbid every run that holds one of `roots`."""
        for number in self.of[roots].unique().tolist():
            if number >= 0:
                self.of[self.of == number] = -1

    def _forbid(self) -> None:
        """Drop the runs that something fixes in place."""
        root = self.flow.root
        for labels, _ in self.flow.facts.pinned:
            self._drop(root[labels])
        for edit in self.flow.facts.edits:
            if isinstance(edit, Pick | SetPlace | CutStored | UseConstant):
                self._drop(root[edit.labels])
            if isinstance(edit, Split):
                for part in edit.parts:
                    self._keep_whole(root[part])
        for link in self.flow.links:
            if link.groups > 1:
                self._drop(root[link.output])
            if link.groups > 1 and link.input is not None:
                self._drop(root[link.input.labels])
        for value in self.flow.values.values():
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, Folded | Parts):
                    self._drop(root[part.value.labels])
                if isinstance(part, Value):
                    self._keep_whole(root[part.labels])
        for link in self.flow.links:
            self._keep_blocks(link)

    def _keep_whole(self, roots: Tensor) -> None:
        """Drop the runs of which `roots`, the variables along a value, hold a part alone, or another order."""
        at = torch.arange(len(roots)) - self.place[roots]
        for number in self.of[roots].unique().tolist():
            if number < 0:
                continue
            run = self.found[number]
            for start in at[self.of[roots] == number].unique().tolist():
                if start < 0 or not torch.equal(roots[start : start + len(run.roots)], run.roots):
                    self._drop(run.roots)
                    break

    def _keep_blocks(self, link: Link) -> None:
        """Drop the runs whose units the columns of blocks of `link`'s layer cut through."""
        layer = link.layer
        if link.input is None or not isinstance(layer, ScaledLayer):
            return
        width, roots = layer.grid.block_size[1], self.flow.root[link.input.labels]
        times = self._times(link)
        for number, start in self.starts(roots[::times]):
            if (start * times) % width or (self.found[number].unit * times) % width:
                self._drop(self.found[number].roots)

    @staticmethod
    def _times(link: Link) -> int:
        """Features that a linear layer reads of each channel; 1 for convs."""
        labels = link.input.labels if link.input is not None else torch.zeros(0)
        if not isinstance(link.layer, nn.Linear) or not len(labels):
            return 1
        changes = (labels.diff() != 0).nonzero().flatten() + 1  # a channel may stand there twice in a row
        return math.gcd(*torch.cat([changes, torch.tensor([len(labels)])]).tolist())

    def starts(self, roots: Tensor) -> Iterator[tuple[int, int]]:
        """(run, position of its first channel) for each run along a value with the variables `roots`."""
        first = ((self.of[roots] >= 0) & (self.place[roots] == 0)).nonzero().flatten().tolist()
        return ((int(self.of[roots[start]]), start) for start in first)

    def moved(self, labels: Tensor, orders: dict[int, Tensor], times: int = 1) -> Tensor:
        """Where each channel of a value with these labels is to come from, given the new order of each run."""
        index = torch.arange(len(labels))
        for number, start in self.starts(self.flow.root[labels][::times]):
            order = orders.get(number)
            if order is not None:
                steps = torch.arange(times)
                features = (order[:, None] * times + steps).flatten()
                index[start * times : start * times + len(features)] = start * times + features
        return index

    def sides(self, link: Link, orders: dict[int, Tensor]) -> tuple[Tensor, Tensor | None]:
        """`moved` for the outputs and the inputs of the layer of `link`."""
        outputs = self.moved(link.output, orders)
        inputs = None if link.input is None else self.moved(link.input.labels, orders, self._times(link))
        return outputs, inputs
