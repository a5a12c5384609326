"""Steps of the CPU engine put together: compiled code, its tables and arguments, and the call that runs them.

A step's arguments are addresses in buffers that are not known before the call; a `Place` stands for one. A `Program`
holds the steps, a `Call` has their arguments for certain buffers. All steps are done in one call of compiled code,
which releases the interpreter lock.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fxdbsr.kernels import jit
from fxdbsr.kernels.cpu_conv import Conv
from fxdbsr.kernels.cpu_cuts import code_of, line_table, row_table, task_table
from fxdbsr.kernels.cpu_images import Copy, Pool, copy_step, pool_step
from fxdbsr.kernels.cpu_layout import Layout
from fxdbsr.kernels.cpu_plan import Geometry
from fxdbsr.kernels.cpu_steps import TASK, conv_step
from fxdbsr.kernels.cpu_team import LINE, team


@dataclass(frozen=True)
class Place:
    """An address: so many bytes from the start of the buffer of that number."""

    buffer: int
    offset: int = 0


@dataclass(frozen=True)
class Step:
    """A compiled step.

    Args:
        function: its code.
        arguments: places, and numbers that are known already.
        tasks: how many it has.
        kept: what the numbers point into.
    """

    function: jit.Compiled
    arguments: tuple[Place | int, ...]
    tasks: int
    kept: tuple[Tensor, ...] = ()


def conv_of(
    conv: Geometry,
    target: jit.Target,
    images: int,
    threads: int,
    layouts: tuple[Layout, Layout, Layout | None],
    places: Sequence[Place | int],
    nnz: int,
) -> Step:
    """A conv between `layouts` of x, y, residual; `places` are those of x, y, residual, bias, w, crow, col."""
    code, seen = code_of(conv, target, *layouts, images)
    tables = _tables(code, conv, nnz, seen, threads)
    numbers = [table.data_ptr() for table in tables]
    return Step(_compiled_conv(code), (*places, *numbers, nnz), len(tables[2]) // len(TASK), tables)


def copy_of(copy: Copy, images: int, places: Sequence[Place | int]) -> Step:
    """A copy of images; `places` are those of x and y."""
    return Step(_compiled_copy(copy), tuple(places), images * (copy.y.size[0] + 2 * copy.y.border[0]))


def pool_of(pool: Pool, images: int, places: Sequence[Place | int]) -> Step:
    """A pool of images; `places` are those of x and y."""
    return Step(_compiled_pool(pool), tuple(places), images * pool.out[0])


@lru_cache(512)
def _compiled_conv(code: Conv) -> jit.Compiled:
    return jit.load(conv_step(code), code.target, "step")


@lru_cache(512)
def _compiled_copy(copy: Copy) -> jit.Compiled:
    return jit.load(copy_step(copy), copy.target, "step")


@lru_cache(512)
def _compiled_pool(pool: Pool) -> jit.Compiled:
    return jit.load(pool_step(pool), pool.target, "step")


@lru_cache(512)
def _tables(code: Conv, conv: Geometry, nnz: int, images: int, threads: int) -> tuple[Tensor, ...]:
    rows = conv.grid.shape[0]
    tables = row_table(code, conv.grid), line_table(code), task_table(code, rows, nnz, images, threads)
    return tuple(torch.tensor(table, dtype=torch.int32) for table in tables)


class Program:
    """Steps to be done in order.

    Args:
        target: what their code was compiled for.
        steps: in order.
        threads: how many share the work.
    """

    def __init__(self, target: jit.Target, steps: Sequence[Step], threads: int) -> None:
        self.steps, self.threads = steps, threads
        self._alone = jit.function(team(False), target, 4)
        self._team = jit.function(team(True), target, 4) if threads > 1 and jit.openmp() else None
        words: list[int] = []
        self.patches: dict[int, list[int]] = {}  # of each buffer, the words to which its address is added
        at = 3 * len(steps)
        for step in steps:
            words += [step.function.address, 8 * at, step.tasks]
            at += len(step.arguments)
        for argument in (argument for step in steps for argument in step.arguments):
            if isinstance(argument, Place):
                self.patches.setdefault(argument.buffer, []).append(len(words))
            words.append(argument.offset if isinstance(argument, Place) else argument)
        self.counters = len(words)
        words += [0] * (LINE // 8 * (len(steps) * threads + 1))
        self.words, self._array = words, ctypes.c_int64 * len(words)

    def call(self, buffers: Sequence[int]) -> Call:
        """The arguments for buffers at these addresses; an address can be set again."""
        words = self._array(*self.words)
        start = ctypes.addressof(words)
        for i in range(len(self.steps)):
            words[3 * i + 1] += start
        call = Call(self, words, start)
        for buffer, address in enumerate(buffers):
            call.set(buffer, address)
        return call

    def run(self, start: int) -> None:
        """Do all steps with the arguments at that address."""
        counters = -(-(start + 8 * self.counters) // LINE) * LINE
        if self._team is not None and _parallel:
            self._team(start, len(self.steps), counters, self.threads)
        else:
            self._alone(start, len(self.steps), counters, 1)


@dataclass
class Call:
    """A program's arguments; they serve one run at a time."""

    program: Program
    words: ctypes.Array[ctypes.c_int64]
    start: int

    def set(self, buffer: int, address: int) -> None:
        """Say where the buffer of that number lies."""
        offsets = self.program.words
        for word in self.program.patches.get(buffer, ()):
            self.words[word] = offsets[word] + address

    def run(self) -> None:
        """Do all steps."""
        self.program.run(self.start)


_parallel = True


def is_parallel() -> bool:
    """True where steps may be shared between threads."""
    return _parallel and jit.openmp() is not None


def _serial_after_fork() -> None:
    """A forked child has none of its parent's OpenMP threads, and waiting for them would never end."""
    global _parallel
    _parallel = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_serial_after_fork)
