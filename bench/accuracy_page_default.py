"""The tables of docs/accuracy.md on how the default came about: when scales learn, when blocks go."""

from __future__ import annotations

from bench.accuracy_plans import PAIR, WHEN
from bench.accuracy_table import Group, difference, groups
from bench.accuracy_words import OURS, pipe, records, shown

EARLY = "lead early=True"


def early() -> str:
    """The default and as it was when scales learned from the first step, both less gradual pruning."""
    sets = {
        "generated": "the generated images",
        "narrow": "the same, half the width",
        "draws": "images of their own for each seed",
        "digits": "the digits",
    }
    table = []
    for data, what in sets.items():
        among = groups(record | {"draw": None if data == "draws" else 0} for record in records(data))
        for theirs in sorted((g for g in among if g.name == "gradual"), key=lambda g: (g.width, g.sparsity)):
            others = {g.name: g for g in among if (g.place, g.sparsity) == (theirs.place, theirs.sparsity)}
            gaps = [difference(others[name], theirs) if name in others else None for name in (EARLY, OURS)]
            width = f", {theirs.width} channels" if data == "draws" else ""
            seeds = " and ".join(dict.fromkeys(str(gap.count) for gap in gaps if gap))
            table.append([f"{what}{width}", f"{theirs.sparsity:.0%}", *(shown(gap) for gap in gaps), seeds])
    return pipe(table, ["less gradual pruning, on", "MACs zero", "from the first step", "from `begin` on", "seeds"])


def schedule() -> str:
    """The schedules of the plan "when": the default and gradual pruning less dense nets, and less each other."""
    seeds = range(*WHEN)
    among = groups(r | {"draw": None} for r in records("trials") if r["seed"] in seeds and r["draw"] == r["seed"])
    sides = {(group.name, group.sparsity or 0.0, *_span(group)): group for group in among}
    dense = next(group for group in among if group.name == "dense")
    table = []
    for sparsity, begin, end in sorted({key[1:] for key in sides if key[0] in PAIR}):
        ours, theirs = (sides.get((arm, sparsity, begin, end)) for arm in PAIR)
        gaps = [_gap(ours, dense), _gap(theirs, dense), _gap(ours, theirs)]
        table.append([f"{sparsity:.0%}", f"{begin:g} to {end:g}", *gaps])
    return pipe(table, ["MACs zero", "blocks go", "default less dense", "gradual less dense", "default less gradual"])


def _span(group: Group) -> tuple[float, float]:
    record = group.runs[min(group.runs)]
    return record["begin"], record["end"]


def _gap(one: Group | None, other: Group | None) -> str:
    if one is None or other is None:
        return ""
    gap = difference(one, other)
    return f"{shown(gap)}, {gap.count}"
