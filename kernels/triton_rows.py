"""Rows of blocks as the Triton kernels see them, and which of them share an activation tile.

Rows (parts of rows, where a row holds several groups) that read the same input channels are joined, 1, 2 or 4
at a time, into unions; a union visits every column in which one of its rows has a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from fxdbsr.blocks import BlockGrid


@dataclass(frozen=True)
class Row:
    """Outputs `first .. first + height` of one group: lines `skip .. skip + height` of a row of blocks.

    Args:
        columns: bit c is set where the row has a block in column c.
    """

    first: int
    height: int
    group: int
    block_row: int
    skip: int
    columns: int


def column_masks(crow: Sequence[int], col: Sequence[int]) -> tuple[int, ...]:
    """For each row of blocks the bit mask of the columns that it has.

    >>> [bin(mask) for mask in column_masks([0, 2, 2], [0, 3])]
    ['0b1001', '0b0']
    """
    return tuple(sum(1 << c for c in col[crow[i] : crow[i + 1]]) for i in range(len(crow) - 1))


def split_rows(grid: BlockGrid, columns: Sequence[int]) -> list[Row]:
    """The rows of blocks, those that hold several groups cut into one for each group."""
    per_group = grid.out_channels // grid.groups
    rows = []
    for i, (start, stop) in enumerate(grid.rows()):
        first = start
        while first < stop:
            group = first // per_group
            end = min(stop, (group + 1) * per_group)
            rows.append(Row(first, end - first, group, i, first - start, columns[i]))
            first = end
    return rows


def columns_of(members: Sequence[Row]) -> int:
    """Bit mask of the columns in which any of the rows has a block."""
    union = 0
    for row in members:
        union |= row.columns
    return union


def unions(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """All rows in sets of up to `size`, each within one group."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return [members for group in sorted(groups) for members in cluster(groups[group], size)]


def cluster(rows: Sequence[Row], size: int, swaps: int = 2000) -> list[list[Row]]:
    """Sets of up to `size` rows with many columns in common: greedy, then random swaps that do not hurt."""
    if size == 1:
        return [[row] for row in rows]
    left = sorted(rows, key=lambda row: row.columns.bit_count())
    sets = []
    while left:
        members = [left.pop()]
        union = members[0].columns
        while len(members) < size and left:
            best = min(range(len(left)), key=lambda i: ((union | left[i].columns).bit_count(), i))
            members.append(left.pop(best))
            union |= members[-1].columns
        sets.append(members)
    random = Random(0)
    for _ in range(swaps if len(sets) > 1 else 0):
        a, b = random.sample(range(len(sets)), 2)
        i, j = random.randrange(len(sets[a])), random.randrange(len(sets[b]))
        one, two = sets[a].copy(), sets[b].copy()
        one[i], two[j] = two[j], one[i]
        if visits(one) + visits(two) <= visits(sets[a]) + visits(sets[b]):
            sets[a], sets[b] = one, two
    return in_order(sets)


def in_order(sets: Sequence[Sequence[Row]]) -> list[list[Row]]:
    """The same sets, rows with equal columns dealt out in ascending order, so that a tile's outputs lie together.

    A kernel writes them, and reads a residual, in longer pieces then.
    """
    alike: dict[int, list[Row]] = {}
    for row in sorted((row for members in sets for row in members), key=lambda row: row.first, reverse=True):
        alike.setdefault(row.columns, []).append(row)
    return [sorted((alike[row.columns].pop() for row in members), key=lambda row: row.first) for members in sets]


def spans(grid: BlockGrid, members: Sequence[Row]) -> list[tuple[int, int, int]]:
    """(column, first channel, end) of every column that the union visits, channels counted within the group."""
    mask = columns_of(members)
    return [(c, start, stop) for c, (start, stop) in enumerate(grid.columns()) if mask >> c & 1]


def visits(members: Sequence[Row]) -> int:
    """Columns that a union of these rows visits."""
    return columns_of(members).bit_count()
