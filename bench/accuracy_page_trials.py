"""The tables of docs/trials.md: trials, the first look, tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.accuracy_figure import LABELS
from bench.accuracy_records import Record, changes, key, key_of
from bench.accuracy_setting import Setting
from bench.accuracy_table import difference, groups
from bench.accuracy_trials import TRIALS, Trial
from bench.accuracy_words import SPARSITIES, mean_of, pipe, records, shown, verdict


def trials() -> str:
    """Every trial: what was expected, what came, on the images and seeds for tuning."""
    runs = {key(record): record for record in records("trials")}
    lines = [line for trial in TRIALS if (line := _trial(trial, runs, 0.9, 1, range(100, 110)))]
    return pipe(lines, ["idea", "expected", "ours", "gradual pruning", "difference", ""])


def confirmed() -> str:
    """Trials that ran on the reported images and seeds."""
    runs = {key(record): record for record in records("trials")}
    runs |= {key(record): record for record in records("earlier")}
    lines = [
        [line[0], f"{sparsity:.0%}", *line[2:]]
        for trial in TRIALS[1:]
        for sparsity in SPARSITIES
        if (line := _trial(trial, runs, sparsity, 0, range(5)))
    ]
    return pipe(lines, ["idea", "MACs zero", "ours", "gradual pruning", "difference", ""])


def _trial(trial: Trial, runs: dict[str, Record], sparsity: float, draw: int, seeds: Sequence[int]) -> list[str]:
    """A line of the table, empty where no pair of runs is there."""

    def of(side: Callable[[int, float, int], Setting]) -> list[Record]:
        wanted = [key_of(side(seed, sparsity, draw)) for seed in seeds]
        return [runs[name] for name in wanted if name in runs]

    ours, theirs = groups(of(trial.ours)), groups(of(trial.theirs))
    if not ours or not theirs:
        return []
    gap = difference(ours[0], theirs[0])
    if not gap.count:
        return []
    return [trial.idea, trial.expected, mean_of(ours[0]), mean_of(theirs[0]), shown(gap), verdict(gap)]


def first_look() -> str:
    """The first look at many ideas: two seeds, before the learning rate was tuned."""
    table = []
    for group in groups(records("first_look")):
        others = changes(group.runs[min(group.runs)])
        words = ", ".join(
            f"{name} {others[name]}" for name in others if name not in ("seed", "draw", "options", "sparsity")
        )
        table.append([group.name.removeprefix("lead "), words, mean_of(group)])
    return pipe(table, ["arm and options", "else", "accuracy"])


def tuning(data: str, width: int, depth: int = 1) -> str:
    """Learning rates and weight decays that were tried for each arm in such nets, best first; means over the seeds."""
    plain = {"data": data, "width": width, "depth": depth, "gamma": None, "end": 0.67, "power": 0.5}
    plain |= {"begin": 0.1} if depth == 1 else {}
    runs = [r for r in records("tuning") if all(r[name] == value for name, value in plain.items())]
    if depth > 1:  # which ran at 90 %, too, for when one-shot pruning goes
        runs = [r for r in runs if r["sparsity"] in (None, 0.7)]
    tried: dict[tuple[str, str], dict[tuple[float, float], list[float]]] = {}
    for r in runs:
        of_arm = tried.setdefault((r["arm"], _options_of(r)), {})
        of_arm.setdefault((r["lr"], r["weight_decay"]), []).append(float(r["accuracy"]))
    table = []
    for (arm, options), of_arm in tried.items():
        means = {rates: sum(values) / len(values) for rates, values in of_arm.items()}
        best = sorted(means, key=lambda rates: -means[rates])
        words = ", ".join(f"{lr:g} / {decay:g}: {means[lr, decay]:.1f}" for lr, decay in best)
        table.append([f"{LABELS.get(arm, arm)} {options}".strip(), words])
    return pipe(table, ["", "learning rate / weight decay: accuracy"])


def going() -> str:
    """When one-shot pruning goes in the deeper net, on the images and seeds for tuning."""
    runs = [r for r in records("tuning") if r["depth"] == 2 and r["arm"] in ("once", "once_layer")]
    best = [r for r in runs if (r["lr"], r["weight_decay"]) == (0.8, 2e-3)]
    places = sorted({(r["arm"], r["sparsity"], r["end"]) for r in best})
    table = [
        [
            LABELS[arm],
            f"{sparsity:.0%}",
            end,
            mean_of(groups(r for r in best if (r["arm"], r["sparsity"], r["end"]) == (arm, sparsity, end))[0]),
        ]
        for arm, sparsity, end in places
    ]
    return pipe(table, ["", "MACs zero", "goes at", "accuracy"])


def _options_of(record: Record) -> str:
    return ", ".join(f"{name}={value}" for name, value in record["options"])
