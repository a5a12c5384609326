"""The printed table: figures with units, columns that fit the line, reasons as notes below it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import TYPE_CHECKING

from tabulate import DataRow, Line, TableFormat, tabulate

from fxdbsr.reporting.rows import LayerRow, sum_rows

if TYPE_CHECKING:
    from fxdbsr.reporting.result import Report

_TIGHT = TableFormat(
    lineabove=None,
    linebelowheader=Line("", "-", " ", ""),
    linebetweenrows=None,
    linebelow=None,
    headerrow=DataRow("", " ", ""),
    datarow=DataRow("", " ", ""),
    padding=0,
    with_header_hide=None,
)
SHORTEST_NAME = 12


@dataclass(frozen=True)
class Column:
    """One column: its header, how a row fills it, and the order in which columns give way (largest first)."""

    header: str
    cell: Callable[[LayerRow], str]
    gives_way: int = 0
    right: bool = True


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


def _columns(notes: dict[str, str]) -> list[Column]:
    def kernel(row: LayerRow) -> str:
        return f"{row.kernel} {notes[row.reason]}" if row.reason else row.kernel

    def blocks(row: LayerRow) -> str:
        return f"{row.blocks_kept}/{row.blocks_total}" if row.blocks_total else ""

    def sparsity(row: LayerRow) -> str:
        return percent(row.sparsity) if row.block_size or row.blocks_total else ""

    def ms(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"

    return [
        Column("kind", lambda row: row.kind, 5, right=False),
        Column("weight", lambda row: shape(row.weight_shape), 2),
        Column("output", lambda row: shape(row.output_shape), 4),
        Column("block", lambda row: shape(row.block_size), 3),
        Column("blocks\nkept", blocks),
        Column("zero", sparsity),
        Column("MACs\ndense", lambda row: figure(row.macs_dense)),
        Column("\nkept", lambda row: figure(row.macs)),
        Column("\nrun", lambda row: figure(row.macs_run)),
        Column("\nsaved", lambda row: percent(row.saved) if row.macs_dense else ""),
        Column("params\ndense", lambda row: figure(row.params_dense)),
        Column("\nnow", lambda row: figure(row.params)),
        Column("bytes", lambda row: figure(row.bytes), 1),
        Column("ms\ndense", lambda row: ms(row.ms_dense)),
        Column("\nnow", lambda row: ms(row.ms)),
        Column("kernel", kernel, right=False),
    ]


def text(report: Report, sort: str | None, depth: int | None, only_changed: bool, width: int) -> str:
    """`report` as lines of at most `width` characters."""
    rows = arranged(report.rows, sort, depth, only_changed)
    shown = [*rows, report.other, report.total]
    reasons = list(dict.fromkeys(row.reason for row in shown if row.reason))
    notes = {reason: f"[{i}]" for i, reason in enumerate(reasons, 1)}
    columns = [c for c in _columns(notes) if any(c.cell(row) for row in shown)]
    longest = max(len(row.name) for row in shown)
    dropped = []
    while (left := width - _width(columns, shown)) < min(longest, 24) and any(c.gives_way for c in columns):
        column = max(columns, key=lambda c: c.gives_way)
        columns.remove(column)
        dropped.append(" ".join(column.header.split()))
    names = [shorten(row.name, max(left, SHORTEST_NAME)) for row in shown]
    cells = [[name, *(c.cell(row) for c in columns)] for name, row in zip(names, shown, strict=True)]
    align = ["left", *("right" if c.right else "left" for c in columns)]
    headers = ["layer", *(c.header for c in columns)]
    table = tabulate(cells, headers, _TIGHT, colalign=align, disable_numparse=True)
    hidden = len(report.rows) - len(rows) if only_changed else 0
    return "\n".join([*heading(report), "", table, "", *_below(report, notes, dropped, hidden)])


def heading(report: Report) -> list[str]:
    """Model, inputs and totals, each with its unit."""
    total = report.total
    lines = [
        f"{report.model} on {', '.join(report.inputs)} (batch included)",
        f"MACs (1 multiply-accumulate, 2 FLOPs): dense {_both(total.macs_dense)}, "
        f"kept {_both(total.macs)}, run {_both(total.macs_run)}",
        f"params: dense {total.params_dense:,}, now {total.params:,}; {total.bytes / 1e6:,.2f} MB",
    ]
    if total.blocks_total:
        lines[-1] += (
            f"; blocks: {total.blocks_kept:,} of {total.blocks_total:,} kept, sparsity {total.sparsity:.1%}"
        )
    return lines


def _both(macs: int) -> str:
    return f"{macs / 1e9:.3f} GMACs ({2 * macs / 1e9:.3f} GFLOPs)"


def _below(report: Report, notes: dict[str, str], dropped: list[str], hidden: int) -> list[str]:
    lines = [f"{mark} {reason}" for reason, mark in notes.items()]
    if hidden:
        lines.append(f"{hidden} layers without zero blocks are not shown")
    if dropped:
        lines.append(f"not shown at this width: {', '.join(dropped)}")
    return lines


def _width(columns: Sequence[Column], rows: Sequence[LayerRow]) -> int:
    """Characters that `columns` take, with the space before each."""
    return sum(
        1 + max(*(len(part) for part in c.header.split("\n")), *(len(c.cell(row)) for row in rows))
        for c in columns
    )


def shorten(name: str, width: int) -> str:
    """`name` in at most `width` characters, its middle left out.

    >>> shorten("layer4.0.downsample.0", 12)
    'layer...le.0'
    """
    if len(name) <= width:
        return name
    head = (width - 3 + 1) // 2
    return f"{name[:head]}...{name[len(name) - (width - 3 - head) :]}"


def arranged(
    rows: Sequence[LayerRow], sort: str | None, depth: int | None, only_changed: bool
) -> list[LayerRow]:
    """`rows` chosen, summed by stage and sorted as `Report.table` says."""
    chosen = [row for row in rows if row.changed or not only_changed]
    if depth is not None:
        if depth < 1:
            raise ValueError(f"depth: expected at least 1, got {depth}")
        stages = groupby(chosen, lambda row: ".".join(row.name.split(".")[:depth]))
        chosen = [_stage(name, list(members)) for name, members in stages]
    if sort is not None:
        known = [*(field.name for field in fields(LayerRow)), "saved"]
        if sort not in known:
            raise ValueError(f"sort: expected one of {', '.join(known)}, got {sort!r}")
        words = any(isinstance(getattr(row, sort), str) for row in chosen)
        chosen.sort(key=lambda row: (getattr(row, sort) is not None, getattr(row, sort)), reverse=not words)
    return chosen


def _stage(name: str, members: list[LayerRow]) -> LayerRow:
    return members[0] if len(members) == 1 else sum_rows(members, name, f"{len(members)} layers")


def markdown(report: Report) -> str:
    """`report` as a Markdown table with every column, and the reasons in full."""
    shown = [*report.rows, report.other, report.total]
    columns = [c for c in _columns({row.reason: "" for row in shown}) if any(c.cell(row) for row in shown)]
    columns.append(Column("reason", lambda row: row.reason, right=False))
    cells = [[_escaped(row.name), *(_escaped(c.cell(row)) for c in columns)] for row in shown]
    align = ["left", *("right" if c.right else "left" for c in columns)]
    group = ""
    headers = ["layer"]
    for column in columns:
        first, _, second = column.header.partition("\n")
        group = first or group
        headers.append(f"{group} {second}".strip())
    table = tabulate(cells, headers, "pipe", colalign=align, disable_numparse=True)
    return "\n\n".join(["  \n".join(_escaped(line) for line in heading(report)), table])


def _escaped(value: str) -> str:
    for character in "\\`*_<>|[]":
        value = value.replace(character, "\\" + character)
    return value
