"""The graph as text for Graphviz and as a picture: layers coloured by the MACs saved, sized by their dense MACs.

Pictures are drawn by Graphviz's `dot` where it is installed and quick enough, else by matplotlib.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import networkx as nx

from fxdbsr.files import check_writable, write, writing
from fxdbsr.reporting.outline import label, macs, outline, places, share

ENGINES = ("auto", "graphviz", "matplotlib")
FORMATS = ("svg", "png", "pdf")
DOT_NODES = 1500  # dot takes about a second for 1,000 nodes and 20 for 3,000
DOT_SECONDS = 60
NOTHING, ALL = (238, 241, 245), (96, 165, 240)  # colours of a layer of which nothing, and all, is saved
LANE, ROW = 3.4, 1.0  # inches from box to box in matplotlib's drawing
MOST_PIXELS, MOST_AREA, LEAST_DPI = 60_000, 1e8, 30  # of a side of matplotlib's PNG, of the whole, to be readable


def colour(saved: float) -> str:
    """The fill of a layer that saves that fraction of its MACs: grey at 0, blue at 1.

    >>> colour(0), colour(1)
    ('#eef1f5', '#60a5f0')
    """
    mixed = (round(a + (b - a) * saved) for a, b in zip(NOTHING, ALL, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def to_dot(graph: nx.DiGraph[str]) -> str:
    """`graph`, whole or in outline, in Graphviz's language; the names of nodes are the graph's."""
    size = share(graph)
    lines = [
        "digraph model {",
        '  node [fontname="sans-serif", fontsize=11, shape=plaintext];',
        '  edge [color="#8a93a0"];',
    ]
    for name, figures in graph.nodes(data=True):
        style = ""
        if "kind" in figures:
            width, height = 1.6 + 1.4 * size[name], 0.5 + 0.9 * size[name]
            fill = colour(figures["saved"])
            style = f', shape=box, style="rounded,filled", fillcolor="{fill}", width={width:.2f}, height={height:.2f}'
        text = "\\n".join(_quoted(line) for line in _label(figures))
        lines.append(f'  "{_quoted(name)}" [label="{text}"{style}];')
    lines += [f'  "{_quoted(source)}" -> "{_quoted(target)}";' for source, target in graph.edges]
    return "\n".join([*lines, "}"])


def _label(figures: dict[str, Any]) -> list[str]:
    if "follows" in figures:
        return label(figures)
    name = figures["name"] or "model"
    return [name, figures["kind"], macs(figures)] if "kind" in figures else [name, figures["operation"]]


def _quoted(text: Any) -> str:
    return str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")


def draw(graph: nx.DiGraph[str], path: Path, engine: str = "auto") -> str:
    """Write the outline of `graph` to `path`, in the format of its suffix; returns the engine that drew it.

    Raises:
        ValueError: an unknown suffix or engine; more nodes than a PNG can show.
        ImportError: the engine is not installed; with "auto", neither is.
        OSError: `path` cannot be written.
        RuntimeError: Graphviz was asked for by name, and fails or takes more than a minute.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise ValueError(f"path: expected a name that ends in .svg, .png or .pdf, got {str(path)!r}")
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    check_writable(path)
    small = outline(graph)
    if engine == "auto":
        quick = shutil.which("dot") is not None and len(small) <= DOT_NODES
        engine = "graphviz" if quick else "matplotlib"
    if engine == "graphviz":
        write(path, _graphviz(small, kind))
    else:
        with writing(path) as part:
            _matplotlib(small, part, kind)
    return engine


def _graphviz(graph: nx.DiGraph[str], kind: str) -> bytes:
    program = shutil.which("dot")
    if program is None:
        raise ImportError("engine: Graphviz's program dot is not installed")
    try:
        done = subprocess.run(
            [program, f"-T{kind}"], input=to_dot(graph).encode(), capture_output=True, timeout=DOT_SECONDS, check=True
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"engine: dot took more than {DOT_SECONDS} s for {len(graph)} nodes") from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"engine: dot failed: {error.stderr.decode(errors='replace').strip()}") from None
    return done.stdout


def _matplotlib(graph: nx.DiGraph[str], path: Path, kind: str) -> None:
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("engine: a drawing needs Graphviz's program dot, or matplotlib") from error
    at = {name: (lane * LANE, -row * ROW) for name, (row, lane) in places(graph).items()}
    width = LANE * (1 + max((lane for lane, _ in at.values()), default=0) / LANE)
    height = ROW * (1 + max((-y for _, y in at.values()), default=0) / ROW)
    dpi = min(100.0, MOST_PIXELS / max(width, height), math.sqrt(MOST_AREA / (width * height)))
    if kind == "png" and dpi < LEAST_DPI:
        raise ValueError(f"path: the graph has {len(graph):,} nodes, too many for a PNG; choose .svg or .pdf")
    figure = Figure(figsize=(width, height), dpi=dpi)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-LANE / 2, width - LANE / 2)
    axes.set_ylim(-height + ROW / 2, ROW / 2)
    axes.add_collection(_edges(graph, at))
    size = share(graph)
    for name, figures in graph.nodes(data=True):
        grown = size.get(name, 0.0)
        box = {"facecolor": "none", "edgecolor": "none"}
        if "kind" in figures:
            box = {"facecolor": colour(figures["saved"]), "edgecolor": "#5b6470"}
        text = "\n".join(label(figures)).replace("$", r"\$")
        shape = {"boxstyle": f"round,pad={0.2 + 0.8 * grown:.2f}"} | box
        axes.text(*at[name], text, ha="center", va="center", fontsize=6, clip_on=True, bbox=shape)
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(path, format=kind)


def _edges(graph: nx.DiGraph[str], at: dict[str, tuple[float, float]]) -> Any:
    """Lines from node to node; those that pass others in their own lane go around on the right."""
    from matplotlib.collections import LineCollection

    def line(source: str, target: str) -> Sequence[tuple[float, float]]:
        (x, y), (u, v) = at[source], at[target]
        if x == u and y - v > ROW:
            return [(x, y), (x + 0.45 * LANE, y - ROW / 2), (x + 0.45 * LANE, v + ROW / 2), (u, v)]
        return [(x, y), (u, v)]

    return LineCollection([line(*edge) for edge in graph.edges], colors="#8a93a0", linewidths=0.8, zorder=0)
