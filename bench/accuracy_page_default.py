"""The tables of docs/accuracy.md on how the default came about: when scales learn, when blocks go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.accuracy_figure import LABELS
from bench.accuracy_plans import PAIR, WHEN
from bench.accuracy_records import Record
from bench.accuracy_table import Difference, Group, difference, groups
from bench.accuracy_words import OURS, mean_of, pick, pipe, records, shown

EARLY = "lead early=True"
REPORTED = {
    ("generated", 32): "the generated images",
    ("generated", 16): "the same, half the width",
    ("digits", 16): "the digits",
}


def early() -> str:
    """Our arm as it was when scales learned from the first step, and from `begin` = 0.1 on, less gradual pruning."""
    table = []
    for what, among in _reported(records("earlier")).items():
        table += _early_rows(what, among)
    drawn = groups(record | {"draw": None} for record in records("draws"))
    for width in (16, 32):
        what = f"images of their own for each seed, {width} channels"
        table += _early_rows(what, [group for group in drawn if group.width == width])
    return pipe(table, ["less gradual pruning, on", "MACs zero", "from the first step", "from `begin` on", "seeds"])


def _early_rows(what: str, among: Sequence[Group]) -> list[list[str]]:
    rows = []
    for sparsity in _sparsities(among):
        theirs = pick(among, "gradual", sparsity)
        gaps = [_gap(pick(among, name, sparsity), theirs) for name in (EARLY, OURS)]
        seeds = " and ".join(dict.fromkeys(str(gap.count) for gap in gaps if gap))
        rows.append([what, f"{sparsity:.0%}", *map(shown, gaps), seeds])
    return rows


def later() -> str:
    """What a begin at 0.3 of the steps gives over one at 0.1, arm by arm, on the reported images."""
    arms = ("scaled", "gradual", "gradual_layer")
    now = _reported(record for data in ("generated", "narrow", "digits") for record in records(data))
    before = _reported(records("earlier"))
    table = []
    for what, among in now.items():
        for sparsity in _sparsities(among):
            gaps = [_gap(pick(among, arm, sparsity), pick(before[what], arm, sparsity)) for arm in arms]
            table.append([what, f"{sparsity:.0%}", *map(_counted, gaps)])
    return pipe(table, ["0.3 less 0.1, on", "MACs zero", *(LABELS[arm] for arm in arms)])


def _reported(found: Iterable[Record]) -> dict[str, list[Group]]:
    """The groups of each reported set, by what it is called."""
    runs = list(found)
    return {what: groups(run for run in runs if (run["data"], run["width"]) == key) for key, what in REPORTED.items()}


def _sparsities(among: Sequence[Group]) -> list[float]:
    return sorted({group.sparsity for group in among if group.sparsity is not None})


def schedule() -> str:
    """The schedules of the plan "when": the default and gradual pruning less dense nets, and less each other."""
    among = _when()
    sides = {(group.name, group.sparsity or 0.0, *_span(group)): group for group in among}
    dense = next(group for group in among if group.name == "dense")
    table = []
    for sparsity, begin, end in sorted({key[1:] for key in sides if key[0] in PAIR}):
        ours, theirs = (sides.get((arm, sparsity, begin, end)) for arm in PAIR)
        gaps = [_gap(ours, dense), _gap(theirs, dense), _gap(ours, theirs)]
        table.append([f"{sparsity:.0%}", f"{begin:g} to {end:g}", *map(_counted, gaps)])
    return pipe(table, ["MACs zero", "blocks go", "default less dense", "gradual less dense", "default less gradual"])


def _when() -> list[Group]:
    """The groups of the plan "when", whose seeds have images of their own."""
    seeds = range(*WHEN)
    return groups(r | {"draw": None} for r in records("trials") if r["seed"] in seeds and r["draw"] == r["seed"])


def _span(group: Group) -> tuple[float, float]:
    record = group.runs[min(group.runs)]
    return record["begin"], record["end"]


def _gap(one: Group | None, other: Group | None) -> Difference | None:
    return None if one is None or other is None else difference(one, other)


def _counted(gap: Difference | None) -> str:
    return f"{shown(gap)}, {gap.count}" if gap and gap.count else ""


def one_shot() -> str:
    """One-shot pruning at two times of the plan "when"; our default less each."""
    among = _when()
    table = []
    for sparsity in (0.7, 0.9):
        ours = next(g for g in among if (g.name, g.sparsity, *_span(g)) == (OURS, sparsity, 0.3, 0.67))
        for group in among:
            if group.name in ("once", "once_layer") and group.sparsity == sparsity:
                what = f"{LABELS[group.name]}, at {_span(group)[1]:g} of the steps"
                table.append([f"{sparsity:.0%}", what, mean_of(group), _counted(_gap(ours, group))])
    return pipe(table, ["MACs zero", "", "accuracy", "default less it"])
