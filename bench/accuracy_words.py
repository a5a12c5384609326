"""The words and figures that the tables of docs/accuracy.md are made of; verdicts are computed, not written.

A difference is of pairs of one seed, with its standard error in brackets; "better" and "worse" are more than two
standard errors away from 0 over at least three seeds, everything else is a tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from bench.accuracy_records import Record, read
from bench.accuracy_table import Difference, Group, difference

RESULTS = Path(__file__).parent / "results"
OURS = "scaled"
SPARSITIES = (0.3, 0.5, 0.7, 0.9)


def records(data: str) -> list[Record]:
    """Of the result file with that name."""
    return read(RESULTS / f"accuracy_{data}.jsonl")


def pick(among: Sequence[Group], arm: str, sparsity: float | None) -> Group | None:
    """The group of an arm at a sparsity, if it ran."""
    return next((group for group in among if group.name == arm and group.sparsity == sparsity), None)


def verdict(gap: Difference) -> str:
    """In a word."""
    if gap.count < 3:
        return "too few seeds"
    if abs(gap.mean) <= 2 * gap.error:
        return "tie"
    return "better" if gap.mean > 0 else "worse"


def gap_to(among: Sequence[Group], arm: str, sparsity: float) -> Difference | None:
    """Our default less `arm` at a sparsity; None where one of them did not run."""
    ours, other = pick(among, OURS, sparsity), pick(among, arm, None if arm == "dense" else sparsity)
    return None if ours is None or other is None else difference(ours, other)


def gap_in_words(among: Sequence[Group], arm: str, sparsity: float) -> str:
    """The same with its error and verdict."""
    gap = gap_to(among, arm, sparsity)
    return "" if gap is None else f"{shown(gap)} {verdict(gap)}"


def shown(gap: Difference | None) -> str:
    """A difference and its standard error in brackets."""
    if gap is None or not gap.count:
        return ""
    error = "" if math.isnan(gap.error) else f" ({gap.error:.2f})"
    return f"{gap.mean:+.2f}{error}"


def mean_of(group: Group | None) -> str:
    """Mean, standard deviation, number of seeds."""
    if group is None:
        return ""
    spread = "" if math.isnan(group.deviation()) else f" ± {group.deviation():.1f}"
    return f"{group.mean():.1f}{spread} ({len(group.runs)})"


def pipe(rows: Sequence[Sequence[object]], heads: list[str]) -> str:
    """A table in Markdown."""
    if not rows:
        return "Not measured yet."
    return str(tabulate(rows, heads, "pipe", disable_numparse=True))
