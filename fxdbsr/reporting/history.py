"""The history of a training as small charts, one a figure, for the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

AXES = ("step", "epoch")
WIDTH, HEIGHT, EDGE = 320, 130, 8
UNITS = {
    "ms": "ms",
    "accuracy": "fraction of 1",
    "error": "fraction of 1",
    "sparsity": "fraction that is zero",
    "density": "fraction kept",
    "macs": "MACs",
    "params": "parameters",
    "bytes": "bytes",
}


def charts(history: Sequence[Mapping[str, Any]]) -> str:
    """A figure of HTML for every key of `history` that holds numbers, drawn over "step", "epoch" or the entries.

    NaN and infinity are left out of a curve.

    Raises:
        TypeError: `history` is no sequence of mappings.
    """
    if isinstance(history, str | bytes | Mapping) or not isinstance(history, Sequence):
        raise TypeError(f"history: expected a sequence of mappings, got {type(history).__name__}")
    for i, entry in enumerate(history):
        if not isinstance(entry, Mapping):
            raise TypeError(f"history: expected mappings, got {type(entry).__name__} at {i}")
    axis = next((key for key in AXES if history and all(_number(e.get(key)) for e in history)), None)
    keys = dict.fromkeys(key for entry in history for key in entry if key not in AXES)
    drawn = []
    for key in keys:
        points = [
            (float(entry[axis]) if axis else i, float(entry[key]))
            for i, entry in enumerate(history)
            if _number(entry.get(key))
        ]
        if points:
            drawn.append(_chart(str(key), axis or "entry", points))
    return "\n".join(drawn)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _chart(key: str, axis: str, points: list[tuple[float, float]]) -> str:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)

    def place(x: float, y: float) -> str:
        across = (x - min(xs)) / ((max(xs) - min(xs)) or 1)
        up = (y - low) / ((high - low) or 1)
        return f"{EDGE + across * (WIDTH - 2 * EDGE):.1f},{HEIGHT - EDGE - up * (HEIGHT - 2 * EDGE):.1f}"

    unit = next((unit for word, unit in UNITS.items() if key.lower().split("_")[-1] == word), "")
    title = f"{key}, {unit}" if unit else key
    words = (
        f"{axis} {xs[0]:g} to {xs[-1]:g}: first {ys[0]:.4g}, lowest {low:.4g}, highest {high:.4g}, last {ys[-1]:.4g}"
    )
    line = " ".join(place(*point) for point in points)
    end = place(*points[-1]).split(",")
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> {escape(words)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {words}")}">'
        f'<polyline points="{line}"/><circle cx="{end[0]}" cy="{end[1]}" r="3"/></svg></figure>'
    )
