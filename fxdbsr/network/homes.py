"""Where each value of a graph lies: in a layout that suits its readers, of those in which it can be written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import fx, nn

from fxdbsr.kernels import jit
from fxdbsr.kernels.cpu_layout import Layout
from fxdbsr.kernels.cpu_plan import Geometry, packed_input, writes
from fxdbsr.network.operations import Image, Operation
from fxdbsr.nn.packed import PackedConv


def homes(
    graph: fx.Graph,
    images: Mapping[fx.Node, Image],
    operations: Mapping[fx.Node, Operation],
    inputs: Mapping[fx.Node, Layout],
    conv_of: Callable[[PackedConv | nn.Linear], Geometry],
    target: jit.Target,
) -> dict[fx.Node, Layout]:
    """The layout of each image of `graph`; arguments as of `Plan`, and the geometry of a layer."""
    chooser = _Chooser(images, operations, inputs, conv_of, target)
    for node in reversed(graph.nodes):
        if node in images:
            chooser.found[node] = chooser.home(node)
    return chooser.found


def readers(node: fx.Node, operations: Mapping[fx.Node, Operation]) -> Iterator[fx.Node]:
    """The nodes that read the value of `node`, also as another shape."""
    for user in node.users:
        if user in operations and operations[user].kind == "same":
            yield from readers(user, operations)
        else:
            yield user


@dataclass
class _Chooser:
    """Goes from the last node to the first, as a pool's value wants to lie as its readers want it."""

    images: Mapping[fx.Node, Image]
    operations: Mapping[fx.Node, Operation]
    inputs: Mapping[fx.Node, Layout]
    conv_of: Callable[[PackedConv | nn.Linear], Geometry]
    target: jit.Target
    found: dict[fx.Node, Layout] = field(default_factory=dict)

    def home(self, node: fx.Node) -> Layout:
        """The layout of `node`; those of the nodes behind it are known."""
        image, operation = self.images[node], self.operations.get(node)
        last = Layout.channels_last(image.channels, image.size)
        read_by = [*readers(node, self.operations)]
        if operation is None:
            return self.inputs.get(node, last)
        if operation.kind in ("linear", "same") or any(reader not in self.operations for reader in read_by):
            return last
        wanted = [self._wanted(node, reader) for reader in read_by]
        for layout in sorted(wanted, key=lambda w: w.border, reverse=True):
            alike = [
                w.border for w in wanted if (w.block, w.pixel, w.groups) == (layout.block, layout.pixel, layout.groups)
            ]
            layout = replace(layout, border=(max(top for top, _ in alike), max(left for _, left in alike)))
            if operation.layer is None:
                fits = layout.groups == 1
            else:
                fits = writes(self.conv_of(operation.layer), layout, self.target)
            if fits:
                return layout
        return last

    def _wanted(self, node: fx.Node, reader: fx.Node) -> Layout:
        """The layout in which `reader` reads the value of `node` best."""
        operation, image = self.operations[reader], self.images[node]
        if operation.layer is not None and operation.inputs[0] in (node, *self._same_as(node)):
            return packed_input(self.conv_of(operation.layer), self.target, image.size)
        return replace(self.found[reader], channels=image.channels, size=image.size, border=(0, 0))

    def _same_as(self, node: fx.Node) -> Iterator[fx.Node]:
        for user in node.users:
            if user in self.operations and self.operations[user].kind == "same":
                yield user
                yield from self._same_as(user)
