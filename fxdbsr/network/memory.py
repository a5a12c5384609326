"""Offsets in one arena for buffers that live for a while: first fit, largest gaps left whole.

A buffer with a border, or with planes that its channels do not fill, must find zeros there: what writes it leaves
them alone. It shares memory only with buffers of its own layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fxdbsr.kernels.cpu_layout import Layout

if TYPE_CHECKING:
    from fxdbsr.network.plan import Buffer

ALIGN = 4096  # bytes; what lies in pages of its own does not share cache lines


def is_full(layout: Layout) -> bool:
    """True where every element of an image is one of its values."""
    return layout.image == layout.channels * layout.size[0] * layout.size[1]


def arrange(buffers: Sequence[Buffer], batch: int, itemsize: int) -> int:
    """Set the offset of each of `buffers`; returns the bytes of the arena."""
    size = 0
    placed: list[tuple[int, int, Buffer]] = []
    kept: list[tuple[int, int, Buffer]] = []
    for buffer in sorted(buffers, key=lambda b: b.first):
        need = -(-(batch * buffer.layout.image * itemsize + 256) // ALIGN) * ALIGN
        if is_full(buffer.layout):
            alive = sorted((start, stop) for start, stop, b in placed if b.last >= buffer.first)
            at = 0
            for start, stop in alive:
                if at + need <= start:
                    break
                at = max(at, stop)
            buffer.offset = at
            placed.append((at, at + need, buffer))
            size = max(size, at + need)
        else:
            kept.append((need, 0, buffer))
    slots: list[tuple[Layout, int, int]] = []
    for need, _, buffer in kept:
        free = next((i for i, slot in enumerate(slots) if slot[0] == buffer.layout and slot[2] < buffer.first), None)
        if free is None:
            slots.append((buffer.layout, size, buffer.last))
            buffer.offset, size = size, size + need
        else:
            slots[free] = (buffer.layout, slots[free][1], buffer.last)
            buffer.offset = slots[free][1]
    return size
