"""The printed table: figures with units, columns that fit the line, reasons as notes below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from textwrap import wrap
from typing import TYPE_CHECKING

from tabulate import SEPARATING_LINE, DataRow, Line, TableFormat, tabulate

from fxdbsr.reporting.columns import Column, all_columns, columns_of, note, precise
from fxdbsr.reporting.rows import LayerRow, sum_rows

if TYPE_CHECKING:
    from fxdbsr.reporting.result import Report

_TIGHT = TableFormat(None, Line("", "-", " ", ""), None, None, None, DataRow("", " ", ""), 0, None)
SHORTEST_NAME = 16


def text(report: Report, sort: str | None, depth: int | None, only_changed: bool, width: int) -> str:
    """`report` as lines of at most `width` characters."""
    check_at_least_1(width, "width")
    rows = arranged(report.rows, sort, depth, only_changed)
    shown = [*rows, *([report.other] if report.other.macs or report.other.params else []), report.total]
    reasons = list(dict.fromkeys(row.reason for row in shown if row.reason))
    notes = {reason: note(i) for i, reason in enumerate(reasons)}
    first = {row.output_shape[:1] for row in report.rows if row.output_shape}
    batch = next(iter(first))[0] if len(first) == 1 else None
    columns = [c for c in all_columns(notes, batch, brief=True) if any(c.cell(row) for row in shown)]
    longest = max(len(row.name) for row in shown)
    dropped = []
    while (left := width - _width(columns, shown)) < min(longest, SHORTEST_NAME) and any(c.gives_way for c in columns):
        column = max(columns, key=lambda c: c.gives_way)
        columns.remove(column)
        dropped.append(column.header)
    names = [shorten(row.name, max(left, SHORTEST_NAME)) for row in shown]
    cells = [[name, *(c.cell(row) for c in columns)] for name, row in zip(names, shown, strict=True)]
    align = ["left", *("right" if c.right else "left" for c in columns)]
    groups = [c.group if i == 0 or columns[i - 1].group != c.group else "" for i, c in enumerate(columns)]
    headers = [["", *groups], ["layer", *(c.header for c in columns)]]
    lines = [*headers, SEPARATING_LINE, *cells[:-1], SEPARATING_LINE, cells[-1]]
    table = tabulate(lines, (), _TIGHT, colalign=align, disable_numparse=True)
    hidden = len(report.rows) - len(rows) if only_changed else 0
    return "\n".join([*heading(report), "", table, "", *_below(notes, dropped, hidden, width), *_parts(report, width)])


def heading(report: Report) -> list[str]:
    """Model, inputs and totals, each with its unit."""
    total = report.total
    figures = [
        ["", "dense", "kept", "run", ""],
        [
            "MACs",
            *(precise(m) for m in (total.macs_dense, total.macs, total.macs_run)),
            "1 multiply-accumulate",
        ],
        ["FLOPs", *(precise(2 * m) for m in (total.macs_dense, total.macs, total.macs_run)), "2 a MAC"],
        [
            "params",
            f"{total.params_dense:,}",
            f"{total.params:,}",
            "",
            f"{total.bytes / 1e6:,.2f} MB as saved",
        ],
    ]
    if total.blocks_total:
        zero = f"sparsity {total.sparsity:.1%}"
        figures.append(["blocks", f"{total.blocks_total:,}", f"{total.blocks_kept:,}", "", zero])
    table = tabulate(figures, (), "plain", colalign=("left", *["right"] * 3, "left"), disable_numparse=True)
    return [f"{report.model} on {', '.join(report.inputs)}, batch included", *table.split("\n")]


def _below(notes: dict[str, str], dropped: list[str], hidden: int, width: int) -> list[str]:
    lines = [f"{mark}: {reason}" for reason, mark in notes.items()]
    if hidden:
        lines.append(f"{hidden} layers without zero blocks are not shown")
    if dropped:
        lines.append(f"not shown at this width: {', '.join(dropped)}")
    return [part for line in lines for part in wrap(line, width, subsequent_indent="   ")]


def _parts(report: Report, width: int) -> list[str]:
    """Why parts of the model are in no graph: their layers are packed one by one, and dead channels stay in them."""
    lines = [f"in no graph: {name or report.model}: {why}" for name, why in report.untraced.items()]
    return [part for line in lines for part in wrap(line, width, subsequent_indent="   ")]


def _width(columns: Sequence[Column], rows: Sequence[LayerRow]) -> int:
    """Characters that `columns` take, with the space before each."""
    return sum(1 + max(len(c.group), len(c.header), *(len(c.cell(row)) for row in rows)) for c in columns)


def shorten(name: str, width: int) -> str:
    """`name` in at most `width` characters: its longest part, or where that is too short the whole, is cut inside.

    >>> shorten("layer4.0.downsample.0", 16), shorten("layer4.0.downsample.0", 12)
    ('layer4.0.do~le.0', 'layer...le.0')
    """
    if len(name) <= width:
        return name
    longest = max(name.split("."), key=len)
    left = len(longest) - (len(name) - width) - 1
    if left >= 2:
        head, tail = longest[: (left + 1) // 2], longest[len(longest) - left // 2 :]
        return name.replace(longest, f"{head}~{tail}", 1)
    head = name[: (width - 2) // 2]
    return f"{head}...{name[len(name) - (width - 3 - len(head)) :]}"


def arranged(rows: Sequence[LayerRow], sort: str | None, depth: int | None, only_changed: bool) -> list[LayerRow]:
    """`rows` chosen, summed by stage and sorted as `Report.table` says."""
    chosen = [row for row in rows if row.changed or not only_changed]
    if depth is not None:
        check_at_least_1(depth, "depth")
        stages: dict[str, list[LayerRow]] = {}
        for row in chosen:
            stages.setdefault(".".join(row.name.split(".")[:depth]), []).append(row)
        chosen = [_stage(name, members) for name, members in stages.items()]
    if sort is not None:
        known = [*(field.name for field in fields(LayerRow)), "saved"]
        if sort not in known:
            raise ValueError(f"sort: expected one of {', '.join(known)}, got {sort!r}")
        words = any(isinstance(getattr(row, sort), str) for row in chosen)
        chosen.sort(key=lambda row: (getattr(row, sort) is not None, getattr(row, sort)), reverse=not words)
    return chosen


def check_at_least_1(value: object, where: str) -> None:
    """Refuse what is no positive int.

    Raises:
        TypeError, ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: expected an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{where}: expected at least 1, got {value}")


def _stage(name: str, members: list[LayerRow]) -> LayerRow:
    return members[0] if len(members) == 1 else sum_rows(members, name, f"{len(members)} layers")


def markdown(report: Report) -> str:
    """`report` as a Markdown table with every column, and the reasons in full."""
    shown = [*report.rows, report.other, report.total]
    columns = columns_of(shown)
    columns.append(Column("", "reason", lambda row: row.reason, right=False))
    cells = [[_escaped(row.name), *(_escaped(c.cell(row)) for c in columns)] for row in shown]
    align = ["left", *("right" if c.right else "left" for c in columns)]
    headers = ["layer", *(c.name for c in columns)]
    table = tabulate(cells, headers, "pipe", colalign=align, disable_numparse=True)
    lines = "\n".join(f"    {line}" for line in heading(report))
    return f"{lines}\n\n{table}"


def _escaped(value: str) -> str:
    for character in "\\`*_<>|[]":
        value = value.replace(character, "\\" + character)
    return value
