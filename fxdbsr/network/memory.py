"""Offsets in one arena for buffers that each live for a while.

A buffer with a border, or with planes that its channels do not fill, must find zeros there, and what writes it leaves
them as they are. It shares memory with buffers of its own layout alone; the others take the first gap that fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxdbsr.kernels.cpu_layout import Layout

PAGE = 4096  # bytes; buffers start on pages of their own
SLACK = 256  # bytes behind a buffer that vectors may read
FOREVER = 1 << 60


@dataclass
class Buffer:
    """Memory of one value in one layout.

    Args:
        layout: of an image.
        outside: it is a tensor of its own, made in each call; else it lies in the arena.
        alone: it holds one image at a time; else all of the batch.
        first, last: place in the order of the item that writes it, and of the last one that reads it.
        offset: bytes from the arena's start.
    """

    layout: Layout
    outside: bool = False
    alone: bool = False
    first: int = 0
    last: int = 0
    offset: int = 0


def arrange(buffers: Sequence[Buffer], batch: int, itemsize: int) -> int:
    """Set the offset of each of `buffers`; returns the bytes of the arena."""
    size = 0
    placed: list[tuple[int, int, Buffer]] = []
    own: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: b.first):
        if not buffer.layout.is_full:
            own.append(buffer)
            continue
        need, at = _bytes(buffer, batch, itemsize), 0
        for start, stop, other in sorted(placed, key=lambda p: p[0]):
            if other.last >= buffer.first:
                if at + need <= start:
                    break
                at = max(at, stop)
        buffer.offset = at
        placed.append((at, at + need, buffer))
        size = max(size, at + need)
    slots: dict[tuple[Layout, bool], list[Buffer]] = {}
    for buffer in own:
        slot = slots.setdefault((buffer.layout, buffer.alone), [])
        free = next((i for i, other in enumerate(slot) if other.last < buffer.first), None)
        if free is None:
            buffer.offset, size = size, size + _bytes(buffer, batch, itemsize)
            slot.append(buffer)
        else:
            buffer.offset, slot[free] = slot[free].offset, buffer
    return size


def _bytes(buffer: Buffer, batch: int, itemsize: int) -> int:
    images = 1 if buffer.alone else batch
    return -(-(images * buffer.layout.image * itemsize + SLACK) // PAGE) * PAGE
