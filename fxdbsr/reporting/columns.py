"""The columns of the table: how a row fills each of them, and how figures are written."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from string import ascii_lowercase

from fxdbsr.reporting.rows import LayerRow


@dataclass(frozen=True)
class Column:
    """One column: its header of two lines, and how a row fills it.

    Attributes:
        value: what sorts it; None for words.
        gives_way: where a line is too long, columns with the largest go first; those with 0 stay.
    """

    group: str
    header: str
    cell: Callable[[LayerRow], str]
    value: Callable[[LayerRow], float | None] | None = None
    gives_way: int = 0
    right: bool = True

    @property
    def name(self) -> str:
        """Group and header in one."""
        return f"{self.group} {self.header}".strip()


def figure(value: float, unit: str = "") -> str:
    """`value` to three digits with k, M, G or T.

    >>> figure(4_089_184_256), figure(118_013_952), figure(999_999), figure(64)
    ('4.09G', '118M', '1.00M', '64')
    """
    if abs(value) < 1000:
        return f"{value:.0f}{unit}"
    for prefix in "kMGTP":
        value /= 1000
        if abs(value) < 999.5 or prefix == "P":
            break
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{prefix}{unit}"


def percent(fraction: float) -> str:
    """`fraction` in percent, where only 0 and 1 themselves print as 0% and 100%.

    >>> percent(0), percent(0.004), percent(0.5), percent(0.999)
    ('0%', '<1%', '50%', '>99%')
    """
    if 0 < fraction < 0.005:
        return "<1%"
    return ">99%" if 0.995 <= fraction < 1 else f"{fraction:.0%}"


def shape(value: Sequence[int] | None) -> str:
    """`value` as 64x3x7x7."""
    return "" if value is None else "x".join(str(n) for n in value)


def all_columns(notes: dict[str, str], batch: int | None = None, brief: bool = False) -> list[Column]:
    """The columns in their order.

    Args:
        notes: the mark to print for each reason.
        batch: first axis of every output, which is then said once and left out.
        brief: kinds as conv, convT and fc; the weight's shape tells the number of axes.
    """

    def kind(row: LayerRow) -> str:
        if brief:
            known = {"linear": "fc", "other": "", "total": ""}
            return known.get(row.kind, re.sub(r"_transpose(\dd)$|(\dd)$", lambda m: "T" if m[1] else "", row.kind))
        return row.kind

    def kernel(row: LayerRow) -> str:
        return f"{row.kernel} {notes[row.reason]}".strip() if row.reason else row.kernel

    def blocks(row: LayerRow) -> str:
        return f"{row.blocks_kept}/{row.blocks_total}" if row.blocks_total else ""

    def saved(row: LayerRow) -> str:
        return percent(row.saved) if row.macs_dense else ""

    def size(value: Sequence[int] | None) -> int:
        return prod(value or (0,))

    def sparsity(row: LayerRow) -> str:
        return percent(row.sparsity) if row.block_size or row.blocks_total else ""

    def output(row: LayerRow) -> str:
        return "" if row.output_shape is None else shape(row.output_shape[0 if batch is None else 1 :])

    def ms(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"

    return [
        Column("", "kind", kind, None, 5, right=False),
        Column("", "weight", lambda row: shape(row.weight_shape), lambda row: prod(row.weight_shape or (0,)), 2),
        Column("" if batch is None else f"{batch} x", "output", output, lambda r: prod(r.output_shape or (0,)), 4),
        Column("", "block", lambda row: shape(row.block_size), lambda row: prod(row.block_size or (0,)), 3),
        Column("blocks", "kept", blocks, lambda row: row.blocks_kept),
        Column("", "zero", sparsity, lambda row: row.sparsity),
        Column("MACs", "dense", lambda row: figure(row.macs_dense), lambda row: row.macs_dense),
        Column("MACs", "kept", lambda row: figure(row.macs), lambda row: row.macs),
        Column("MACs", "run", lambda row: figure(row.macs_run), lambda row: row.macs_run),
        Column("MACs", "cut", lambda row: percent(row.saved) if row.macs_dense else "", lambda row: row.saved),
        Column("params", "dense", lambda row: figure(row.params_dense), lambda row: row.params_dense),
        Column("params", "now", lambda row: figure(row.params), lambda row: row.params),
        Column("", "bytes", lambda row: figure(row.bytes), lambda row: row.bytes, 1),
        Column("ms", "dense", lambda row: ms(row.ms_dense), lambda row: row.ms_dense),
        Column("ms", "now", lambda row: ms(row.ms), lambda row: row.ms),
        Column("", "kernel", kernel, right=False),
    ]


def columns_of(rows: Sequence[LayerRow]) -> list[Column]:
    """Every column that has something to say about `rows`, without notes."""
    columns = all_columns({row.reason: "" for row in rows})
    return [column for column in columns if any(column.cell(row) for row in rows)]


def note(index: int) -> str:
    """Mark of the note with that index: a to z, then two letters, then three.

    >>> note(0), note(25), note(26), note(702)
    ('a', 'z', 'aa', 'aaa')
    """
    before, last = divmod(index, 26)
    return (note(before - 1) if before else "") + ascii_lowercase[last]


def precise(value: int) -> str:
    """`value` to four digits and more.

    >>> precise(4_089_184_256), precise(40_816_640), precise(512)
    ('4.089 G', '40.82 M', '512')
    """
    if value < 1000:
        return str(value)
    exponent = min((len(str(value)) - 1) // 3, 5)
    scaled = value / 1000**exponent
    return f"{scaled:.{max(4 - len(str(int(scaled))), 0)}f} {' kMGTP'[exponent]}"
