"""The plan of a network: for each value a layout and memory, for each operation its steps, for the rest torch's own.

Values that torch reads or writes lie with channels last, in tensors; values between the engine's operations lie in the
layout that their readers want, in one arena that is planned once: where a value is no longer read, another may lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxdbsr.kernels import cpu_program as steps
from fxdbsr.kernels import jit
from fxdbsr.kernels.cpu_layout import Layout
from fxdbsr.kernels.cpu_plan import Geometry, packed_input, takes, writes
from fxdbsr.kernels.cpu_program import Place, Program, Step
from fxdbsr.kernels.cpu_steps import Pool
from fxdbsr.network.memory import arrange
from fxdbsr.network.operations import Image, Operation
from fxdbsr.nn.packed import PackedConv


@dataclass
class Buffer:
    """Memory of one value in one layout.

    Args:
        layout: of an image.
        node: whose value it holds, where it is a tensor that torch sees.
        outside: the tensor is made anew in each call, by torch or for it; else it lies in the arena.
        first, last: number of the move that writes it, and of the last one that reads it.
        offset: bytes from the arena's start.
    """

    layout: Layout
    node: fx.Node | None = None
    outside: bool = False
    first: int = 0
    last: int = 0
    offset: int = 0


@dataclass
class Move:
    """A step before memory is known: what it reads and writes, and how it is made from their places."""

    reads: tuple[Buffer, ...]
    writes: Buffer
    make: Callable[[Sequence[Place]], Step]


@dataclass
class Run:
    """Moves in a row, and the program that they become."""

    moves: list[Move] = field(default_factory=list)
    program: Program | None = None


class Plan:
    """How a graph runs for inputs of one shape.

    Args:
        graph: of packed convs.
        images: the shape of each value that is an image.
        operations: of the nodes that the engine runs.
        batch, dtype: of all images.
        inputs: layout of each image among the graph's inputs.
        threads: that share the work.
        target: what code is compiled for.
    """

    def __init__(
        self,
        graph: fx.Graph,
        images: Mapping[fx.Node, Image],
        operations: Mapping[fx.Node, Operation],
        batch: int,
        dtype: torch.dtype,
        inputs: Mapping[fx.Node, Layout],
        threads: int,
        target: jit.Target,
    ) -> None:
        self.graph, self.images, self.operations, self.batch, self.dtype = graph, images, operations, batch, dtype
        self.threads, self.target = threads, target
        self.items: list[Run | fx.Node] = []
        self.buffers: dict[fx.Node, Buffer] = {}
        self._moves = 0
        self._homes: dict[fx.Node, Layout] = dict(inputs)
        for node in reversed(graph.nodes):
            if node in images and node not in inputs:
                self._homes[node] = self._home(node)
        self._copies: dict[tuple[fx.Node, Layout], Buffer] = {}
        for node in graph.nodes:
            self._add(node)
        outside = {id(b): b for b in self._all_buffers() if b.outside}
        self.outside = list(outside.values())
        self.bytes = arrange([b for b in self._all_buffers() if not b.outside], batch, dtype.itemsize)
        for item in self.items:
            if isinstance(item, Run):
                item.program = Program(target, [self._step(move) for move in item.moves], threads)

    def _all_buffers(self) -> list[Buffer]:
        found: dict[int, Buffer] = {}
        for item in self.items:
            for move in item.moves if isinstance(item, Run) else ():
                found |= {id(b): b for b in (*move.reads, move.writes)}
        return list(found.values())

    def _step(self, move: Move) -> Step:
        numbers = {id(b): n for n, b in enumerate(self.outside, 1)}
        return move.make([Place(numbers.get(id(b), 0), b.offset) for b in (*move.reads, move.writes)])

    def is_torch(self, node: fx.Node) -> bool:
        """True where torch runs `node`."""
        return node not in self.operations

    def _home(self, node: fx.Node) -> Layout:
        """The layout that suits the readers of `node`, of those in which it can be written."""
        image, operation = self.images[node], self.operations.get(node)
        last = Layout.channels_last(image.channels, image.size)
        users = [self.operations.get(user) for user in node.users]
        if operation is None or any(user is None for user in users):
            return last if operation is None or operation.kind == "conv" else self._narrow(last, node)
        wanted: list[Layout] = []
        for user, found in zip(node.users, users, strict=True):
            assert found is not None
            if found.kind == "conv" and found.inputs[0] is node:
                wanted.append(packed_input(geometry(found.layer), self.target, image.size))
            else:
                wanted.append(replace(self._homes[user], size=image.size, channels=image.channels, border=(0, 0)))
        for layout in sorted(wanted, key=lambda layout: layout.border, reverse=True):
            alike = [w.border for w in wanted if (w.block, w.pixel, w.groups) == (layout.block, layout.pixel, layout.groups)]
            layout = replace(layout, border=(max(b[0] for b in alike), max(b[1] for b in alike)))
            if operation.kind == "conv":
                assert operation.layer is not None
                if writes(geometry(operation.layer), layout, self.target):
                    return layout
            elif layout.groups == 1:
                return layout
        return last

    def _narrow(self, last: Layout, node: fx.Node) -> Layout:
        """`last` cut into the planes of the pool's input, where memory is the same: an image of one pixel."""
        return last

    def _add(self, node: fx.Node) -> None:
        operation = self.operations.get(node)
        if operation is None:
            if node.op not in ("placeholder", "output"):
                self.items.append(node)
                for source in node.all_input_nodes:
                    if source in self.buffers:
                        self.buffers[source].last = 1 << 60
            if node in self.images:
                self.buffers[node] = Buffer(self._homes[node], node, outside=True)
            return
        x = operation.inputs[0]
        if operation.kind == "same":
            self.buffers[node] = self.buffers[x]
            return
        outside = any(self.is_torch(user) and (user.op == "output" or _keeps(user)) for user in node.users)
        torch_reads = any(self.is_torch(user) for user in node.users)
        y = self.buffers[node] = Buffer(self._homes[node], node if torch_reads else None, outside)
        if operation.kind == "conv":
            self._conv(operation, x, y)
        else:
            self._pool(operation, x, y)

    def _move(self, move: Move) -> None:
        if not self.items or not isinstance(self.items[-1], Run):
            self.items.append(Run())
        run = self.items[-1]
        assert isinstance(run, Run)
        run.moves.append(move)
        move.writes.first = move.writes.first or self._moves
        for buffer in (*move.reads, move.writes):
            buffer.last = max(buffer.last, self._moves)
        self._moves += 1

    def _fit(self, node: fx.Node, layout: Layout, fits: bool) -> Buffer:
        """The value of `node` where it lies if that `fits`, else a copy in `layout`."""
        home = self.buffers[node]
        if fits or home.layout == layout:
            return home
        key = (node, layout)
        if key not in self._copies or home.node is not None:
            self._copies[key] = Buffer(layout)
            bfloat16 = self.dtype == torch.bfloat16
            self._move(
                Move(
                    (home,),
                    self._copies[key],
                    lambda places: steps.copy(self.target, bfloat16, self.batch, home.layout, layout, places),
                )
            )
        return self._copies[key]

    def _conv(self, operation: Operation, x: fx.Node, y: Buffer) -> None:
        layer = operation.layer
        assert layer is not None
        conv = geometry(layer)
        at = self.buffers[x].layout
        source = self._fit(x, packed_input(conv, self.target, at.size), takes(conv, self.target, at))
        residual = None
        if len(operation.inputs) > 1:
            other = self.buffers[operation.inputs[1]].layout
            residual = self._fit(operation.inputs[1], replace(y.layout, border=(0, 0)), writes(conv, other, self.target))
        weights, crow, col = layer.weights_of(self.target), layer.crow_indices, layer.col_indices
        bias, nnz = layer.bias, len(layer.col_indices)
        tensors = tuple(t for t in (weights, crow, col, bias) if t is not None)

        def make(places: Sequence[Place]) -> Step:
            at_residual: Place | int = places[1] if residual is not None else 0
            given = (places[0], places[-1], at_residual, 0 if bias is None else bias.data_ptr())
            pointers = (weights.data_ptr(), crow.data_ptr(), col.data_ptr())
            layouts = (source.layout, y.layout, None if residual is None else residual.layout)
            step = steps.conv(conv, self.target, self.batch, self.threads, layouts, (*given, *pointers), nnz)
            return replace(step, kept=(*step.kept, *tensors))

        self._move(Move((source,) if residual is None else (source, residual), y, make))

    def _pool(self, operation: Operation, x: fx.Node, y: Buffer) -> None:
        at = self.buffers[x].layout
        size = y.layout.size
        if size == (1, 1) and y.layout.block >= y.layout.channels and y.layout.channels % at.block == 0:
            y.layout = replace(y.layout, block=at.block, pixel=at.pixel)  # one pixel: the same memory
        wanted = Layout(at.channels, at.size, y.layout.block, y.layout.pixel)
        source = self._fit(x, wanted, at.groups == 1 and (at.block, at.pixel) == (wanted.block, wanted.pixel))
        bfloat16 = self.dtype == torch.bfloat16
        window = operation.kernel, operation.stride, operation.padding
        pool = Pool(self.target, bfloat16, operation.kind, *window, size, source.layout, y.layout)
        self._move(Move((source,), y, lambda places: steps.pool(pool, self.batch, places)))


def _keeps(node: fx.Node) -> bool:
    """True where `node` is code from outside of torch, which may keep what it reads."""
    owner = node.graph.owning_module
    target: Any = owner.get_submodule(str(node.target)) if node.op == "call_module" and owner else node.target
    name = type(target).__module__ if node.op == "call_module" else getattr(target, "__module__", None) or ""
    return node.op != "call_method" and name.split(".")[0] not in ("torch", "_operator", "builtins", "math", "fxdbsr", "")


def geometry(layer: PackedConv | None) -> Geometry:
    """The conv of `layer` as the engine's plans know it."""
    assert layer is not None
    pairs = [(int(v[0]), int(v[1])) for v in (layer.stride, layer.padding, layer.dilation)]
    bfloat16 = layer.values.dtype == torch.bfloat16
    return Geometry(layer.grid, *pairs, bfloat16, layer.bias is not None, layer.activation, layer.negative_slope)


def view(arena: Tensor, buffer: Buffer, batch: int, dtype: torch.dtype, flat: bool) -> Tensor:
    """The tensor of a value that lies in the arena with channels last."""
    C, (H, W) = buffer.layout.channels, buffer.layout.size
    start = arena[buffer.offset : buffer.offset + batch * C * H * W * dtype.itemsize].view(dtype)
    whole = start.view(batch, H, W, C).permute(0, 3, 1, 2)
    return whole.flatten(1) if flat else whole
