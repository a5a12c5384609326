"""The report as one HTML file: totals, a table that sorts, and a picture of each layer's blocks.

Without a network, in light and dark, usable by keyboard: headers and pictures are buttons.
"""

from __future__ import annotations

import base64
import struct
import zlib
from html import escape
from typing import TYPE_CHECKING

from torch import Tensor

from fxdbsr.reporting.columns import columns_of
from fxdbsr.reporting.rows import LayerRow
from fxdbsr.reporting.table import heading

if TYPE_CHECKING:
    from fxdbsr.reporting.result import Report

_KEPT, _ZERO = (37, 99, 175), (214, 217, 222)

_STYLE = """
:root { color-scheme: light dark; --edge: light-dark(#d4d7dc, #3a3f47); --ink: light-dark(#1c1f24, #e6e8eb);
  --paper: light-dark(#fff, #16181c); --faint: light-dark(#f4f5f7, #1e2126) }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 0 auto; max-width: 100rem; padding: 1rem }
h1 { font-size: 1.3rem }
pre { overflow-x: auto }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--edge) }
th { position: sticky; top: 0; background: var(--faint) }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer }
th[aria-sort=ascending] button::after { content: " \\25b2" }
th[aria-sort=descending] button::after { content: " \\25bc" }
.text { text-align: left }
td.reason { white-space: normal; min-width: 14rem }
tfoot td { font-weight: 600 }
img { image-rendering: pixelated; height: 1.6rem; min-width: 1.6rem; max-width: 6rem; display: block }
.mask { background: none; border: 0; padding: 0; cursor: zoom-in }
dialog { color: var(--ink); background: var(--paper); border: 1px solid var(--edge) }
dialog img { height: auto; max-width: none; width: min(80vw, 40rem) }
"""

_SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const th = button.closest("th"), body = document.querySelector("tbody");
  const first = th.classList.contains("text") ? "ascending" : "descending";
  const now = th.ariaSort === "ascending" ? "descending" : th.ariaSort === "descending" ? "ascending" : first;
  for (const other of th.parentNode.children) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", now);
  const key = row => row.children[th.cellIndex].dataset.value ?? row.children[th.cellIndex].textContent;
  const rows = [...body.rows].map(row => [key(row), row]), sign = now === "ascending" ? 1 : -1;
  const text = th.classList.contains("text");
  rows.sort((a, b) => sign * (text ? a[0].localeCompare(b[0], undefined, {numeric: true}) : a[0] - b[0]));
  body.append(...rows.map(pair => pair[1]));
};
const dialog = document.querySelector("dialog");
for (const button of document.querySelectorAll(".mask")) button.onclick = () => {
  dialog.querySelector("h2").textContent = button.title;
  dialog.querySelector("img").src = button.firstElementChild.src;
  dialog.querySelector("img").alt = button.firstElementChild.alt;
  dialog.showModal();
};
"""


def page(report: Report) -> str:
    """`report` as a whole HTML document."""
    columns = columns_of([*report.rows, report.other, report.total])
    heads = [("layer", True), *((column.name, not column.right) for column in columns), ("reason", True)]
    if report.masks:
        heads.append(("blocks", True))
    head = "".join(
        f'<th scope="col"{" class=text" if text else ""}><button>{escape(name)}</button></th>' for name, text in heads
    )

    def line(row: LayerRow) -> str:
        cells = [f'<td class="text">{escape(row.name)}</td>']
        for column in columns:
            number = "" if column.value is None else f' data-value="{column.value(row) or 0}"'
            kind = "" if column.right else ' class="text"'
            cells.append(f"<td{kind}{number}>{escape(column.cell(row))}</td>")
        cells.append(f'<td class="text reason">{escape(row.reason)}</td>')
        if report.masks:
            cells.append(f"<td>{_picture(row, report.masks.get(row.name))}</td>")
        return f"<tr>{''.join(cells)}</tr>"

    title, *totals = heading(report)
    body = "\n".join(line(row) for row in report.rows)
    foot = "\n".join(line(row) for row in (report.other, report.total))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(report.model)}: MACs, parameters and blocks</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<pre>{escape(chr(10).join(totals))}</pre>
<div class="wide" tabindex="0" role="region" aria-label="layers"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
<tfoot>
{foot}
</tfoot>
</table></div>
<dialog><form method="dialog"><button>Close</button></form><h2></h2><img alt=""></dialog>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _picture(row: LayerRow, mask: Tensor | None) -> str:
    if mask is None:
        return ""
    kept, total = int(mask.sum()), mask.numel()
    words = escape(f"{row.name}: {kept} of {total} blocks kept; rows are outputs, columns inputs")
    source = f"data:image/png;base64,{base64.b64encode(png(mask)).decode()}"
    return f'<button class="mask" title="{words}"><img alt="{words}" src="{source}"></button>'


def png(mask: Tensor) -> bytes:
    """`mask [rows, columns]` as a PNG of one pixel a block, of one bit and two colours.

    Source of the format: W3C, Portable Network Graphics Specification.
    """
    rows, columns = mask.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = []
    for line in mask.tolist():
        bits = "".join("1" if kept else "0" for kept in line).ljust(-(-columns // 8) * 8, "0")
        lines.append(b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big"))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 1, 3, 0, 0, 0))
        + chunk(b"PLTE", bytes((*_ZERO, *_KEPT)))
        + chunk(b"IDAT", zlib.compress(b"".join(lines), 9))
        + chunk(b"IEND", b"")
    )
