"""The plan of a graph for inputs of one shape: a layout and memory for each value, steps for each operation.

Values that torch reads or writes lie with channels last. Those between operations of the engine lie in the layout that
their readers want, in an arena that is planned once: where a value is no longer read, another may lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from fxdbsr.kernels import jit
from fxdbsr.kernels.cpu_images import Copy, Pool
from fxdbsr.kernels.cpu_layout import Layout
from fxdbsr.kernels.cpu_plan import Geometry, packed_input, takes, writes
from fxdbsr.kernels.cpu_program import Place, Program, Step, conv_of, copy_of, pool_of
from fxdbsr.network.homes import homes, readers
from fxdbsr.network.memory import FOREVER, Buffer, arrange
from fxdbsr.network.operations import Image, Operation
from fxdbsr.network.weights import Weights
from fxdbsr.nn.packed import PackedConv

LARGE = 512 << 10  # bytes of an image, for each thread, of which their second-level caches hold but one or two


@dataclass
class Move:
    """A step before memory is known: the buffers that it reads and writes, and how it is made for so many images."""

    buffers: tuple[Buffer, ...]  # the last one is written
    make: Callable[[Sequence[Place], int], Step]
    layer: nn.Module | None = None  # whose work it does, None for copies and pools


@dataclass
class Run:
    """Steps in a row; `outside` are the buffers 1, 2, ... of its program, the arena is buffer 0.

    The first move is number `start` of the plan. The first `alone` moves are done image by image.
    """

    start: int
    moves: list[Move] = field(default_factory=list)
    alone: int = 0
    outside: list[Buffer] = field(default_factory=list)
    program: Program | None = None


@dataclass
class Plan:
    """How a graph runs for inputs of one shape.

    Args:
        graph: a converted model's.
        images: the shapes of its values.
        operations: of the nodes that the engine runs.
        aliases: nodes that torch runs whose values share memory with what they read.
        inputs: layouts of the images among the graph's inputs.
        batch, dtype: of all images.
        threads: that share the work.
        target: what code is compiled for.
        weights_of: the weights of a layer.

    Attributes:
        items: runs of steps and nodes that torch runs, in order.
        buffers: of each image.
        bytes: of the arena.
    """

    graph: fx.Graph
    images: Mapping[fx.Node, Image]
    operations: Mapping[fx.Node, Operation]
    aliases: frozenset[fx.Node]
    inputs: Mapping[fx.Node, Layout]
    batch: int
    dtype: torch.dtype
    threads: int
    target: jit.Target
    weights_of: Callable[[PackedConv | nn.Linear], Weights]
    items: list[Run | fx.Node] = field(default_factory=list)  # made here
    buffers: dict[fx.Node, Buffer] = field(default_factory=dict)
    bytes: int = 0

    def __post_init__(self) -> None:
        self._now = 0
        self._homes = homes(self.graph, self.images, self.operations, self.inputs, self._conv, self.target)
        self._copies: dict[tuple[int, Layout], Buffer] = {}
        for node in self.graph.nodes:
            if node in self.operations:
                self._add(node, self.operations[node])
            else:
                self._leave(node)
        runs = [item for item in self.items if isinstance(item, Run)]
        for run in runs:
            self._separate(run)
        buffers = list({id(b): b for run in runs for move in run.moves for b in move.buffers}.values())
        self.bytes = arrange([b for b in buffers if not b.outside], self.batch, self.dtype.itemsize)
        for run in runs:
            run.outside = list({id(b): b for move in run.moves for b in move.buffers if b.outside}.values())
            run.program = Program(self.target, self._steps(run), self.threads)

    def _separate(self, run: Run) -> None:
        """Take the images one by one until their values are so small that caches hold some of each."""
        large = self.threads * LARGE / self.dtype.itemsize
        moves = [n for n, move in enumerate(run.moves, 1) if any(b.layout.image > large for b in move.buffers)]
        run.alone = moves[-1] if moves and self.batch > 1 else 0
        end = run.start + run.alone - 1
        for buffer in (buffer for move in run.moves[: run.alone] for buffer in move.buffers):
            buffer.alone = buffer.first >= run.start and buffer.last <= end and not buffer.outside
            if not buffer.alone:  # it meets all images, from the first one's first move to the last one's last
                buffer.first, buffer.last = min(buffer.first, run.start), max(buffer.last, end)

    def _steps(self, run: Run) -> list[Step]:
        numbers = {id(buffer): number for number, buffer in enumerate(run.outside, 1)}

        def step(move: Move, image: int, images: int) -> Step:
            at = [b.offset + (not b.alone) * image * b.layout.image * self.dtype.itemsize for b in move.buffers]
            places = [Place(numbers.get(id(b), 0), offset) for b, offset in zip(move.buffers, at, strict=True)]
            return move.make(places, images)

        alone = [step(move, image, 1) for image in range(self.batch) for move in run.moves[: run.alone]]
        return [*alone, *(step(move, 0, self.batch) for move in run.moves[run.alone :])]

    def _conv(self, layer: PackedConv | nn.Linear) -> Geometry:
        return self.weights_of(layer).conv

    @property
    def is_whole(self) -> bool:
        """True where the engine runs everything, so that images may be taken in any parts."""
        return len(self.items) == 1 and isinstance(self.items[0], Run)

    def outside_nodes(self, run: Run) -> list[fx.Node]:
        """A node for each of the buffers outside the arena that `run` reads or writes."""
        node_of = {id(buffer): node for node, buffer in reversed(self.buffers.items())}
        return [node_of[id(buffer)] for buffer in run.outside]

    def _leave(self, node: fx.Node) -> None:
        """Let torch run `node`."""
        if node.op not in ("placeholder", "output"):
            self.items.append(node)
            self._now += 1
            for source in node.all_input_nodes:
                if source in self.buffers:
                    buffer = self.buffers[source]
                    buffer.last = FOREVER if node in self.aliases else max(buffer.last, self._now)
        if node in self.images:
            self.buffers[node] = Buffer(self._homes[node], outside=True)

    def _add(self, node: fx.Node, operation: Operation) -> None:
        x = operation.inputs[0]
        if operation.kind == "same":
            self.buffers[node] = self.buffers[x]
            return
        outside = any(reader.op == "output" for reader in readers(node, self.operations))
        y = self.buffers[node] = Buffer(self._homes[node], outside)
        if operation.layer is not None:
            self._add_conv(operation, self.weights_of(operation.layer), self.buffers[x], y)
        else:
            self._add_pool(operation, self.buffers[x], y)

    def _move(
        self, buffers: Sequence[Buffer], make: Callable[[Sequence[Place], int], Step], layer: nn.Module | None = None
    ) -> None:
        self._now += 1
        if not self.items or not isinstance(self.items[-1], Run):
            self.items.append(Run(self._now))
        run = self.items[-1]
        assert isinstance(run, Run)
        run.moves.append(Move(tuple(buffers), make, layer))
        buffers[-1].first = self._now
        for buffer in buffers:
            buffer.last = max(buffer.last, self._now)

    def _fit(self, home: Buffer, layout: Layout, fits: bool) -> Buffer:
        """The value in `home` where it lies if that `fits`, else a copy in `layout`."""
        if fits or home.layout == layout:
            return home
        key = (id(home), layout)
        if key not in self._copies or home.outside or home.last == FOREVER:
            copy = Copy(self.target, self.dtype == torch.bfloat16, home.layout, layout)
            self._copies[key] = Buffer(layout)
            self._move((home, self._copies[key]), lambda places, images: copy_of(copy, images, places))
        return self._copies[key]

    def _add_conv(self, operation: Operation, weights: Weights, x: Buffer, y: Buffer) -> None:
        conv, bias = replace(weights.conv, pool=operation.pool), weights.bias
        source = self._fit(x, packed_input(conv, self.target, x.layout.size), takes(conv, self.target, x.layout))
        residual = None
        if len(operation.inputs) > 1:
            residual = self.buffers[operation.inputs[1]]
            fits = writes(conv, residual.layout, self.target)
            residual = self._fit(residual, replace(y.layout, border=(0, 0)), fits)
        tensors = (weights.values, weights.crow_indices, weights.col_indices)

        def make(places: Sequence[Place], images: int) -> Step:
            layouts = (source.layout, y.layout, residual.layout if residual else None)
            at = (places[0], places[-1], places[1] if residual else 0, bias.data_ptr() if bias is not None else 0)
            given = (*at, *(t.data_ptr() for t in tensors))
            step = conv_of(conv, self.target, images, self.threads, layouts, given, len(weights.col_indices))
            return replace(step, kept=(*step.kept, *tensors, *(() if bias is None else (bias,))))

        self._move((source, residual, y) if residual else (source, y), make, operation.layer)

    def _add_pool(self, operation: Operation, x: Buffer, y: Buffer) -> None:
        at, to = x.layout, y.layout
        if to.size == (1, 1) and to.border == (0, 0) and to.block == to.channels and at.channels % at.block == 0:
            to = replace(to, block=at.block, pixel=at.pixel)  # planes of one pixel lie as one plane does
        wanted = replace(to, size=at.size, border=(0, 0))
        source = self._fit(x, wanted, at.groups == 1 and (at.block, at.pixel) == (wanted.block, wanted.pixel))
        windows = (operation.kernel, operation.stride, operation.padding, to.size)
        pool = Pool(self.target, self.dtype == torch.bfloat16, operation.kind, *windows, source.layout, to)
        self._move((source, y), lambda places, images: pool_of(pool, images, places))
