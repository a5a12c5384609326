"""The outline of the graph as SVG for the page, whose style sheet colours it, in light and dark."""

from __future__ import annotations

from html import escape
from typing import Any

import networkx as nx

from fxdbsr.reporting.outline import label, places, share
from fxdbsr.reporting.table import shorten

MOST_NODES = 5000  # more of them make a page that browsers open slowly
WIDTH, LANE = 240, 280  # of a box, and from box to box, in pixels
LOW, GROWTH, JOIN, GAP = 58, 60, 24, 26  # heights: of a layer of no MACs, what the largest has more, of others, between
CHARACTERS = 34  # of a line in a box


def diagram(graph: nx.DiGraph[str], rows: dict[str, int]) -> str:
    """`graph`, an outline, as an SVG element; layers link to the row of the table with their name's number.

    Args:
        rows: number of the table's row by the name of the layer.
    """
    at, size = places(graph), share(graph)
    heights = {name: LOW + GROWTH * size[name] if name in size else JOIN for name in graph}
    tallest: dict[int, float] = {}
    for name, (row, _) in at.items():
        tallest[row] = max(tallest.get(row, 0), heights[name])
    middle, y = {}, 0.0
    for row in sorted(tallest):
        middle[row] = y + tallest[row] / 2
        y += tallest[row] + GAP
    centre = {name: (lane * LANE + WIDTH / 2, middle[row]) for name, (row, lane) in at.items()}
    width = max((x for x, _ in centre.values()), default=0) + WIDTH / 2
    edges = " ".join(_edge(centre, heights, at, *edge) for edge in graph.edges)
    boxes = "\n".join(
        _box(figures, *centre[name], heights[name], rows.get(figures["name"]))
        for name, figures in graph.nodes(data=True)
    )
    return (
        f'<svg id="graph" viewBox="-20 -20 {width + 60:.0f} {y + 20:.0f}" tabindex="0" role="group" '
        f'aria-label="graph of the model, data flows from top to bottom; arrow keys move it, plus and minus zoom">\n'
        f'<path class="edges" d="{edges}"/>\n{boxes}\n</svg>'
    )


def _edge(
    centre: dict[str, tuple[float, float]],
    heights: dict[str, float],
    at: dict[str, tuple[int, int]],
    source: str,
    target: str,
) -> str:
    """A curve from box to box; past other rows it runs in the outer one of the two lanes, or right of a shared one."""
    (x, y), (u, v) = centre[source], centre[target]
    if at[source][1] == at[target][1] and at[target][0] > at[source][0] + 1:
        side, out = x + WIDTH / 2, x + WIDTH / 2 + 34
        down = f"M{side:.0f} {y:.0f}C{out:.0f} {y:.0f} {out:.0f} {y:.0f} {out:.0f} {y + 30:.0f}"
        return f"{down}V{v - 30:.0f}C{out:.0f} {v:.0f} {out:.0f} {v:.0f} {side:.0f} {v:.0f}"
    start, end = y + heights[source] / 2, v - heights[target] / 2
    leave, reach = (max(start, end - 2 * GAP), end) if x > u else (start, min(end, start + 2 * GAP))
    bend = (leave + reach) / 2
    return f"M{x:.0f} {start:.0f}V{leave:.0f}C{x:.0f} {bend:.0f} {u:.0f} {bend:.0f} {u:.0f} {reach:.0f}V{end:.0f}"


def _box(figures: dict[str, Any], x: float, y: float, height: float, row: int | None) -> str:
    lines = label(figures)
    title = f"<title>{escape(chr(10).join(lines))}</title>"
    shown = [escape(shorten(line, CHARACTERS)) for line in lines]
    left, top = x - WIDTH / 2, y - height / 2
    if "kind" not in figures:
        return (
            f'<g class="join">{title}<rect x="{left:.0f}" y="{top:.0f}" width="{WIDTH}" height="{height:.0f}" rx="12"/>'
            f'<text x="{x:.0f}" y="{y + 4:.0f}">{shown[-1]}</text></g>'
        )
    texts = "".join(f'<text x="{x:.0f}" y="{y + 16 * (i - 1) + 4:.0f}">{line}</text>' for i, line in enumerate(shown))
    box = (
        f'<g class="layer" style="--saved:{100 * figures["saved"]:.1f}%">{title}<rect x="{left:.0f}" y="{top:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}" rx="6"/>{texts}</g>'
    )
    return box if row is None else f'<a href="#row-{row}" tabindex="-1">{box}</a>'
