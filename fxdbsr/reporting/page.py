"""The report as one HTML file: totals, the graph, a table that sorts, a picture of each layer's blocks, the training.

It needs no network and no other file, follows the system's light or dark, and works by keyboard and on a phone.
`page.css` and `page.js` beside this file are put into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fxdbsr.reporting.columns import Column, columns_of, percent, precise
from fxdbsr.reporting.diagram import MOST_NODES, diagram
from fxdbsr.reporting.history import charts
from fxdbsr.reporting.masks import data_url
from fxdbsr.reporting.outline import outline
from fxdbsr.reporting.rows import LayerRow

if TYPE_CHECKING:
    from fxdbsr.reporting.result import Report


def page(report: Report, history: Sequence[Mapping[str, Any]] = ()) -> str:
    """`report` as a whole HTML document.

    Args:
        history: of the training, as in `charts`.
    """
    trained = charts(history)
    training = f'<h2 id="training">Training</h2>\n<div class="charts">\n{trained}\n</div>' if trained else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>{escape(report.model)}: MACs, parameters and blocks</title>
<style>
{_asset("page.css")}</style>
</head>
<body>
<header><div><h1>{escape(report.model)}</h1>
<div class="quiet">on {escape(", ".join(report.inputs))}, batch included</div></div>
<button id="theme" type="button" title="light or dark">◐</button></header>
<main>
{_totals(report)}
{_graph(report)}
{training}
<h2 id="layers">Layers</h2>
<div class="tools"><label>find <input id="filter" type="search" placeholder="a layer's name"></label>
<label><input id="changed" type="checkbox"> only with zero blocks</label> <span id="shown" class="quiet"></span></div>
{_table(report)}
</main>
{_DIALOG if report.masks else ""}
<script>
{_asset("page.js")}</script>
</body>
</html>
"""


_DIALOG = """\
<dialog aria-labelledby="mask-of"><h2 id="mask-of"></h2><div id="about"></div>
<div class="quiet">one square a block, rows are outputs and columns inputs; blue is kept, grey is zero</div>
<canvas role="img"></canvas>
<form method="dialog" class="tools"><span><button id="before" type="button">← layer before</button>
<button id="after" type="button">next layer →</button></span> <button autofocus>close</button></form></dialog>"""


@cache
def _asset(name: str) -> str:
    return (files("fxdbsr.reporting") / name).read_text(encoding="utf-8")


def _totals(report: Report) -> str:
    """Cards: each a figure with its unit, dense and now."""
    total = report.total
    cards = [
        _card("MACs (1 multiply-accumulate)", "macs", total.macs_dense, total.macs, precise)
        + f'<dd class="quiet">{precise(total.macs_run)} MACs run by the kernels</dd>',
        _card("FLOPs (2 a MAC)", "flops", 2 * total.macs_dense, 2 * total.macs, precise)
        + f'<dd class="quiet">{precise(2 * total.macs_run)} FLOPs run by the kernels</dd>',
        _card("parameters", "params", total.params_dense, total.params, "{:,}".format)
        + f'<dd class="quiet">{total.bytes / 1e6:,.2f} MB as saved</dd>',
    ]
    if total.blocks_total:
        words = f'<dd class="quiet">sparsity {total.sparsity:.1%} of the blocks</dd>'
        cards.append(_card("blocks kept", "blocks", total.blocks_total, total.blocks_kept, "{:,}".format) + words)
    if total.ms is not None and total.ms_dense is not None:
        cards.append(_card("ms, all layers summed", "ms", total.ms_dense, total.ms, "{:.3g}".format))
    return '<dl class="cards">' + "".join(f'<div class="card">{card}</div>' for card in cards) + "</dl>"


def _card(name: str, field: str, dense: float, now: float, written: Any) -> str:
    kept = now / dense if dense else 1.0
    saved = "" if now == dense else f", {percent(1 - kept)} less" if now < dense else f", {percent(kept - 1)} more"
    figures = written(dense) if now == dense else f"{written(dense)} → {written(now)}"
    return (
        f'<dt>{name}</dt><dd class="big" data-field="{field}" data-dense="{dense}" data-now="{now}">{figures}'
        f'</dd><dd>{saved.removeprefix(", ") or "as dense"}</dd><div class="bar" aria-hidden="true">'
        f'<span style="width:{100 * min(kept, 1):.1f}%"></span></div>'
    )


def _graph(report: Report) -> str:
    small = outline(report.graph)
    if len(small) > MOST_NODES:
        words = f"The graph has {len(small):,} layers and joins, too many to draw here; to_dot() writes them all."
        return f'<h2>Graph</h2>\n<p class="quiet">{words}</p>'
    numbers = {row.name: i for i, row in enumerate(report.rows)}
    flows = report.graph.graph["edges"] == "data"
    words = "Data flows from top to bottom." if flows else "The model cannot be traced: these are its modules."
    return f"""<h2>Graph</h2>
<div class="tools"><button id="larger" type="button" aria-label="zoom in">+</button>
<button id="smaller" type="button" aria-label="zoom out">&minus;</button>
<button id="fit" type="button">whole graph</button> <button id="start" type="button">start</button>
<span class="legend">MACs saved: 0% <i></i> 100%; taller boxes have more dense MACs</span></div>
{diagram(small, numbers)}
<p class="quiet">{words} Drag to move, wheel, pinch or + and - to zoom; a layer leads to its row.</p>"""


def _table(report: Report) -> str:
    columns = columns_of([*report.rows, report.other, report.total])
    heads = [("layer", True), *((column.name, not column.right) for column in columns), ("reason", True)]
    if report.masks:
        heads.insert(1, ("mask", True))
    head = "".join(
        f'<th scope="col"{" class=text" if text else ""}><button type="button">{escape(name)}</button></th>'
        if name != "mask"
        else '<th scope="col" class="text">mask</th>'
        for name, text in heads
    )
    body = "\n".join(_line(row, columns, report.masks, f"row-{i}") for i, row in enumerate(report.rows))
    foot = "\n".join(_line(row, columns, report.masks, row.kind) for row in (report.other, report.total))
    return f"""<div class="wide" tabindex="0" role="region" aria-label="layers"><table>
<caption>MACs, parameters, bytes{" and milliseconds" if report.total.ms is not None else ""} of every layer, batch
included; a header sorts. Shapes and blocks are output x input channels.</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
<tfoot>
{foot}
</tfoot>
</table></div>"""


def _line(row: LayerRow, columns: list[Column], masks: dict[str, Tensor], name: str) -> str:
    cells = [f'<th scope="row" title="{escape(row.name)}">{escape(row.name)}</th>']
    if masks:
        cells.append(f"<td>{_picture(row, masks.get(row.name))}</td>")
    for column in columns:
        number = "" if column.value is None else f' data-value="{column.value(row) or 0}"'
        kind = "" if column.right else ' class="text"'
        cells.append(f"<td{kind}{number}>{escape(column.cell(row))}</td>")
    cells.append(f'<td class="text reason">{escape(row.reason)}</td>')
    changed = ' data-changed="1"' if row.changed else ""
    return f'<tr id="{name}"{changed}>{"".join(cells)}</tr>'


def _picture(row: LayerRow, mask: Tensor | None) -> str:
    if mask is None:
        return ""
    left = "" if mask.numel() == row.blocks_total or not row.blocks_total else " that dead channels left"
    rows, columns = mask.shape
    words = escape(f"{int(mask.sum())} of {mask.numel()} blocks{left} kept, {rows} rows by {columns} columns")
    name = escape(row.name)
    image = f'<img alt="{words}" src="{data_url(mask)}">'
    return f'<button class="mask" type="button" data-name="{name}" title="{words}">{image}</button>'
