"""How the tables of measured figures are written: rounding that never flatters, and the sentence about the source."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tabulate import tabulate

RESULTS = Path(__file__).parent / "results"


def cut(value: float, digits: int = 2) -> str:
    """`value` with its further digits cut off.

    >>> cut(1.999), cut(0.25)
    ('1.99', '0.25')
    """
    scale = 10**digits
    return f"{math.floor(value * scale + 1e-9) / scale:.{digits}f}"


def cost(value: float) -> str:
    """`value` with its digits after the third rounded up.

    >>> cost(1.0557)
    '1.056'
    """
    return f"{math.ceil(1000 * value - 1e-9) / 1000:.3f}"


def pipe(rows: list[list[str]], heads: list[str], words: int = 1) -> str:
    """A Markdown table whose first `words` columns are words, the others figures."""
    align = ["left"] * words + ["right"] * (len(heads) - words)
    return tabulate(rows, heads, "pipe", colalign=align, disable_numparse=True)


def lines(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Provenance and rows of a JSON-lines file."""
    machine, *rows = map(json.loads, path.read_text().splitlines())
    return machine, rows


def source(path: Path, machine: dict[str, Any]) -> str:
    """A sentence that names the file and the conditions."""
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads, {machine['cpu_capability']}"
    return f"{where}, torch {machine['torch']}, commit {machine['commit']}: `bench/results/{path.name}`."
