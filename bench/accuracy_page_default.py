"""The tables of docs/accuracy.md on how the default came about: when scales learn and how fast, when blocks go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.accuracy_figure import LABELS
from bench.accuracy_plans_default import KNOB_SEEDS, KNOB_SPARSITIES, KNOBS, WHEN, knob
from bench.accuracy_records import Record, key, key_of
from bench.accuracy_table import Difference, Group, difference, groups
from bench.accuracy_words import OURS, mean_of, pipe, records, shown

EARLY = "lead early=True"
SLOWER = "lead scale_lr=0.3"
SHARED = "lead share=0.3"
REPORTED = {
    ("generated", 32): "the generated images",
    ("generated", 16): "the same, half the width",
    ("digits", 16): "the digits",
}


def early() -> str:
    """Ours as it was when scales learned from the first step, and from `begin` = 0.1 on, less gradual pruning."""
    table = []
    for what, among in _by_set(records("earlier")).items():
        table += _early_rows(what, among)
    drawn = groups(record | {"draw": None} for record in records("draws"))
    for width in (16, 32):
        what = f"images of their own for each seed, {width} channels"
        table += _early_rows(what, [group for group in drawn if group.width == width])
    return pipe(table, ["less gradual pruning, on", "MACs zero", "from the first step", "from `begin` on", "seeds"])


def _early_rows(what: str, among: Sequence[Group]) -> list[list[str]]:
    rows = []
    for sparsity in _sparsities(among):
        theirs = _at(among, "gradual", sparsity, 0.1)
        gaps = [_gap(_at(among, name, sparsity, 0.1), theirs) for name in (EARLY, OURS)]
        seeds = " and ".join(dict.fromkeys(str(gap.count) for gap in gaps if gap))
        rows.append([what, f"{sparsity:.0%}", *map(shown, gaps), seeds])
    return rows


def schedule() -> str:
    """The schedules of the plan "when": ours and gradual pruning less dense nets, and less each other."""
    among = _when()
    dense = next(group for group in among if group.name == "dense")
    places = {(g.sparsity or 0.0, *_span(g)) for g in among if g.name in (OURS, "gradual")}
    table = []
    for sparsity, begin, end in sorted(places):
        ours, theirs = (_at(among, name, sparsity, begin, end) for name in (OURS, "gradual"))
        gaps = [_gap(ours, dense), _gap(theirs, dense), _gap(ours, theirs)]
        table.append([f"{sparsity:.0%}", f"{begin:g} to {end:g}", *map(_counted, gaps)])
    return pipe(table, ["MACs zero", "blocks go", "ours less dense", "gradual less dense", "ours less gradual"])


def later() -> str:
    """What a begin at 0.3 of the steps gives over one at 0.1, arm by arm, on the reported images."""
    arms = (OURS, "gradual", "gradual_layer")
    before = _by_set(records("earlier"))
    now = _by_set(record for data in ("generated", "narrow", "digits") for record in records(data))
    table = []
    for what, among in now.items():
        for sparsity in _sparsities(among):
            sides = [[_at([*among, *before[what]], arm, sparsity, b) for b in (0.3, 0.1)] for arm in arms]
            table.append([what, f"{sparsity:.0%}", *(_counted(_gap(*side)) for side in sides)])
    return pipe(table, ["0.3 less 0.1, on", "MACs zero", "ours", *(LABELS[arm] for arm in arms[1:])])


def rate() -> str:
    """Ours with scales at 0.3 of the rate, in two ways that differ in rounding alone, less ours and gradual pruning."""
    wide = (r for r in records("trials") if (r["draw"], r["data"], r["width"]) == (0, "generated", 32))
    looked = groups(wide)
    reported = [*looked, *groups(records("generated"))]
    table = []
    for what, name, among in (
        ("images of their own", SLOWER, _when()),
        ("the reported images", SLOWER, reported),
        ("the reported images, three tenths of each step", SHARED, reported),
    ):
        for sparsity in _sparsities(among):
            mine = _at(among, name, sparsity, 0.3)
            if mine is not None:
                gaps = [_gap(mine, _at(among, arm, sparsity, 0.3)) for arm in (OURS, "gradual")]
                table.append([what, f"{sparsity:.0%}", *map(_counted, gaps)])
    return pipe(table, ["at 0.3 of the rate, on", "MACs zero", "less the default", "less gradual pruning"])


def rates() -> str:
    """In the deeper net, at the tuned learning rate and at half of it: ours less gradual pruning and dense nets."""
    among = [r for data in ("rates", "deep", "tuning") for r in records(data) if _at_a_rate(r)]
    table = []
    for draw, images in ((1, "for tuning"), (0, "reported")):
        for lr in (0.4, 0.2):
            here = groups(r for r in among if (r["draw"], r["lr"]) == (draw, lr))
            dense = next(group for group in here if group.name == "dense")
            for sparsity in _sparsities(here):
                ours, theirs = (_at(here, name, sparsity, 0.3) for name in (OURS, "gradual"))
                gaps = [_gap(ours, theirs), _gap(ours, dense)]
                table.append([images, f"{lr:g}", f"{sparsity:.0%}", mean_of(ours), *map(_counted, gaps)])
    return pipe(table, ["images", "learning rate", "MACs zero", "ours", "ours less gradual", "ours less dense"])


def knob_rows() -> str:
    """Every change of the plan "knobs" less the default, by sparsity."""
    runs = {key(record): record for record in records("knobs")}

    def of(change: dict[str, Any], sparsity: float) -> Group | None:
        wanted = [key_of(knob(change, seed, sparsity)) for seed in KNOB_SEEDS]
        return next(iter(groups(runs[name] for name in wanted if name in runs)), None)

    default, *others = KNOBS
    plain = [of(KNOBS[default], sparsity) for sparsity in KNOB_SPARSITIES]
    table = [[default, *map(mean_of, plain)]]
    for name in others:
        changed = [of(KNOBS[name], sparsity) for sparsity in KNOB_SPARSITIES]
        table.append([name, *(_counted(_gap(*pair)) for pair in zip(changed, plain, strict=True))])
    return pipe(table, ["", *(f"{sparsity:.0%} of the MACs zero" for sparsity in KNOB_SPARSITIES)])


def _at_a_rate(record: Record) -> bool:
    """True of the arms of `rates`; on the images for tuning at 70 % alone."""
    known = record["depth"] == 2 and record["weight_decay"] == 2e-3 and record["arm"] in (OURS, "gradual", "dense")
    return known and (record["draw"] == 0 or record["sparsity"] in (None, 0.7))


def _by_set(found: Iterable[Record]) -> dict[str, list[Group]]:
    """The groups of each reported set, by what it is called."""
    runs = list(found)
    return {what: groups(run for run in runs if (run["data"], run["width"]) == key) for key, what in REPORTED.items()}


def _when() -> list[Group]:
    """The groups of nets of which every seed has images of its own, in the plans "when" and "rate"."""
    seeds = range(*WHEN)
    return groups(r | {"draw": None} for r in records("trials") if r["seed"] in seeds and r["draw"] == r["seed"])


def _sparsities(among: Sequence[Group]) -> list[float]:
    return sorted({group.sparsity for group in among if group.sparsity is not None})


def _at(among: Sequence[Group], name: str, sparsity: float, begin: float, end: float = 0.67) -> Group | None:
    wanted = (name, sparsity, begin, end)
    return next((group for group in among if (group.name, group.sparsity, *_span(group)) == wanted), None)


def _span(group: Group) -> tuple[float, float]:
    record = group.runs[min(group.runs)]
    return record["begin"], record["end"]


def _gap(one: Group | None, other: Group | None) -> Difference | None:
    return None if one is None or other is None else difference(one, other)


def _counted(gap: Difference | None) -> str:
    return f"{shown(gap)}, {gap.count}" if gap and gap.count else ""
