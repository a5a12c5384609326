"""An order of block rows in which neighbours read the same columns, so that a kernel can share what it reads.

Rows are bit masks of columns. Two rows of random masks with half of their blocks read 3/4 of the columns together;
chosen well they read less.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

SWAPS = 24  # a row


def clustered(rows: Sequence[int], swaps_a_row: int = SWAPS) -> list[int]:
    """Positions of `rows` in an order in which each pair, then each four, has many columns in common.

    A row without a partner comes last.

    >>> clustered([0b1100, 0b0011, 0b1100, 0b0011])
    [2, 0, 3, 1]
    """
    single = [([i], columns) for i, columns in enumerate(rows)]
    random, swaps = Random(0), swaps_a_row * len(rows)
    sets = _paired(_paired(single, random, swaps), random, swaps)
    return [i for members, _ in sets for i in members]


def union_share(rows: Sequence[int], order: Sequence[int], size: int, columns: int) -> float:
    """Share of the `columns` that sets of `size` neighbours in `order` read, on average."""
    sets = [order[i : i + size] for i in range(0, len(order), size)]
    return sum(_union([rows[i] for i in members]).bit_count() for members in sets) / (columns * len(sets))


def _union(masks: Sequence[int]) -> int:
    found = 0
    for mask in masks:
        found |= mask
    return found


def _paired(sets: list[tuple[list[int], int]], random: Random, swaps: int) -> list[tuple[list[int], int]]:
    """`sets` of rows and their columns, two and two joined: greedy, then random swaps that do not hurt."""
    left = sorted(sets, key=lambda one: one[1].bit_count())
    odd = [left.pop(0)] if len(left) % 2 else []
    pairs = []
    while left:
        first = left.pop()
        best = min(range(len(left)), key=lambda i: ((first[1] | left[i][1]).bit_count(), i))
        pairs.append([first, left.pop(best)])
    for _ in range(swaps if len(pairs) > 1 else 0):
        (a, b), i, j = random.sample(pairs, 2), random.randrange(2), random.randrange(2)
        before = (a[0][1] | a[1][1]).bit_count() + (b[0][1] | b[1][1]).bit_count()
        after = (a[1 - i][1] | b[j][1]).bit_count() + (b[1 - j][1] | a[i][1]).bit_count()
        if after <= before:
            a[i], b[j] = b[j], a[i]
    return [(a[0] + b[0], a[1] | b[1]) for a, b in pairs] + odd
