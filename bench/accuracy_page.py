"""The tables of docs/accuracy.md, made from the result files of bench/accuracy.py; verdicts are computed, not written.

A difference is of pairs of one seed, with its standard error in brackets; "better" and "worse" are more than two
standard errors away from 0 over at least three seeds, everything else is a tie.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tabulate import tabulate

from bench.accuracy_figure import LABELS
from bench.accuracy_plans import NARROW, PLANS, SEEDS
from bench.accuracy_records import Record, changes, key, key_of, read
from bench.accuracy_table import Difference, Group, difference, groups
from bench.accuracy_training import Setting
from bench.accuracy_trials import TRIALS, Trial

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"
PLACE = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
OURS = "scaled"
SPARSITIES = (0.3, 0.5, 0.7, 0.9)
FIXED = ("scaled", "gradual", "gradual_layer", "once", "once_layer", "channels", "slim")


def rendered(text: str) -> str:
    """`text` with the tables between `<!-- NAME -->` and `<!-- end -->` made anew."""
    return PLACE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def found(data: str) -> list[Group]:
    """The groups of one data set."""
    return groups(read(RESULTS / f"accuracy_{data}.jsonl"))


def pick(among: Sequence[Group], arm: str, sparsity: float | None) -> Group | None:
    """The group of an arm at a sparsity, if it ran."""
    return next((group for group in among if group.name == arm and group.sparsity == sparsity), None)


def run_at(among: Sequence[Group]) -> list[float]:
    """The sparsities at which any arm ran."""
    return [s for s in SPARSITIES if any(group.sparsity == s for group in among)]


def accuracies(data: str) -> str:
    """Mean, standard deviation and number of seeds of every arm."""
    among = found(data)
    if not among:
        return "Not measured yet."
    dense = pick(among, "dense", None)
    heads = ["", *(f"{sparsity:.0%} of the MACs zero" for sparsity in run_at(among))]
    table = [[LABELS[arm], *(_mean(pick(among, arm, s)) for s in run_at(among))] for arm in FIXED]
    return f"Dense: {_mean(dense)}. Percent of the test images, mean ± deviation (seeds).\n\n{_pipe(table, heads)}"


def differences(data: str) -> str:
    """Our default less every other arm, paired by seed."""
    among = found(data)
    if not among:
        return "Not measured yet."
    heads = ["our default less", *(f"{sparsity:.0%}" for sparsity in run_at(among))]
    table = [[LABELS[arm], *(_gap(among, arm, s) for s in run_at(among))] for arm in FIXED[1:]]
    table.append(["dense", *(_gap(among, "dense", s) for s in run_at(among))])
    return _pipe(table, heads)


def summary(data: str) -> str:
    """For every other arm in words where our default is better, worse, or level."""
    among = found(data)
    lines = []
    for arm in (*FIXED[1:], "dense"):
        words: dict[str, list[str]] = {}
        for sparsity in SPARSITIES:
            gap = _difference(among, arm, sparsity)
            if gap is not None:
                words.setdefault(verdict(gap), []).append(f"{sparsity:.0%}")
        if words:
            told = "; ".join(f"{word} at {', '.join(where)}" for word, where in words.items())
            lines.append(f"- The default against {LABELS.get(arm, arm)}: {told}.")
    return "\n".join(lines) or "Not measured yet."


def parameters(data: str) -> str:
    """Parameters that are zero at the sparsities of the MACs."""
    among = found(data)
    heads = ["parameters zero at", *(f"{sparsity:.0%} of the MACs" for sparsity in SPARSITIES)]
    picked = {arm: [pick(among, arm, s) for s in SPARSITIES] for arm in FIXED}
    table = [
        [LABELS[arm], *(f"{group.mean('sparsity_params'):.1%}" if group else "" for group in line)]
        for arm, line in picked.items()
    ]
    return _pipe(table, heads)


def progress() -> str:
    """How many runs of each plan the result files hold."""
    done = {key(record) for file in RESULTS.glob("accuracy_*.jsonl") for record in read(file)}
    table = []
    for name, plan in PLANS.items():
        wanted = {key_of(setting) for setting in plan()}
        table.append([f"`{name}`", str(plan.__doc__), f"{len(wanted & done)} of {len(wanted)}"])
    return _pipe(table, ["plan", "what it runs", "runs done"])


def penalty(data: str) -> str:
    """The authors' form, whose gamma sets the sparsity."""
    table = [
        [group.runs[min(group.runs)]["gamma"], f"{group.mean('sparsity_macs'):.1%}", _mean(group)]
        for group in found(data)
        if group.name.startswith("clamp ")
    ]
    return _pipe(sorted(table), ["gamma", "MACs zero", "accuracy"])


def floor(data: str) -> str:
    """What the default has to reach, and whether it does."""
    among = found(data)
    asked: list[tuple[str, Difference | None, float]] = []
    for s in run_at(among):
        gap = _difference(among, "gradual", s)
        noise = -2 * gap.error if gap and gap.error <= 0.5 else math.nan
        asked.append(
            (f"at {s:.0%}: not below gradual global pruning by more than 2 errors, each at most 0.5", gap, noise)
        )
    for s, least in ((0.7, 2.0), (0.9, 8.0)):
        for arm in ("once", "once_layer"):
            asked.append((f"at {s:.0%}: {least:g} points over {LABELS[arm]}", _difference(among, arm, s), least))
    asked.append(("at 50%: at most 0.5 points under dense", _difference(among, "dense", 0.5), -0.5))
    for s, least in ((0.7, 1.0), (0.9, 3.0)):
        gaps = [gap for arm in FIXED[1:] if (gap := _difference(among, arm, s)) is not None]
        best = min(gaps, key=lambda gap: gap.mean, default=None)
        asked.append((f"goal at {s:.0%}: {least:g} points over the best other arm", best, least))
    table = [[what, _shown(gap), _holds(gap, least)] for what, gap, least in asked]
    return _pipe(table, ["", "difference", "holds"])


def _holds(gap: Difference | None, least: float) -> str:
    if gap is None or gap.count < len(SEEDS):
        return f"not known: {gap.count if gap else 0} of {len(SEEDS)} seeds"
    return "yes" if gap.mean >= least else "no"


def trials() -> str:
    """Every trial: what was expected, what came, on the images and seeds for tuning."""
    runs = {key(record): record for record in read(RESULTS / "accuracy_trials.jsonl")}
    lines = [line for trial in TRIALS if (line := _trial(trial, runs, 0.9, 1, range(100, 110)))]
    return _pipe(lines, ["idea", "expected", "ours", "gradual pruning", "difference", ""])


def confirmed() -> str:
    """Trials that ran on the reported images and seeds."""
    runs = {key(record): record for record in read(RESULTS / "accuracy_trials.jsonl")}
    runs |= {key(record): record for record in read(RESULTS / "accuracy_generated.jsonl")}
    lines = [
        [line[0], f"{sparsity:.0%}", *line[2:]]
        for trial in TRIALS[1:]
        for sparsity in SPARSITIES
        if (line := _trial(trial, runs, sparsity, 0, range(5)))
    ]
    return _pipe(lines, ["idea", "MACs zero", "ours", "gradual pruning", "difference", ""])


def _trial(trial: Trial, runs: dict[str, Record], sparsity: float, draw: int, seeds: Sequence[int]) -> list[str]:
    """A line of the table, empty where no pair of runs is there."""

    def of(side: Callable[[int, float, int], Setting]) -> list[Record]:
        wanted = [key_of(side(seed, sparsity, draw)) for seed in seeds]
        return [runs[name] for name in wanted if name in runs]

    ours, theirs = groups(of(trial.ours)), groups(of(trial.theirs))
    if not ours or not theirs:
        return []
    gap = difference(ours[0], theirs[0])
    return (
        [trial.idea, trial.expected, _mean(ours[0]), _mean(theirs[0]), _shown(gap), verdict(gap)] if gap.count else []
    )


def first_look() -> str:
    """The first look at many ideas: two seeds, before the learning rate was tuned."""
    table = []
    for group in groups(read(RESULTS / "accuracy_first_look.jsonl")):
        others = changes(group.runs[min(group.runs)])
        words = ", ".join(
            f"{name} {others[name]}" for name in others if name not in ("seed", "draw", "options", "sparsity")
        )
        table.append([group.name.removeprefix("lead "), words, _mean(group)])
    return _pipe(table, ["arm and options", "else", "accuracy"])


def tuning(data: str, width: int) -> str:
    """Learning rates and weight decays that were tried for each arm in nets of that width, best first."""
    plain = {"data": data, "width": width, "gamma": None, "begin": 0.1, "end": 0.67, "power": 0.5}
    records = read(RESULTS / "accuracy_tuning.jsonl")
    records = [r for r in records if all(r[name] == value for name, value in plain.items())]
    table = []
    for arm in dict.fromkeys(record["arm"] for record in records):
        best = sorted((r for r in records if r["arm"] == arm), key=lambda r: -float(r["accuracy"]))
        tried = ", ".join(f"{r['lr']:g} / {r['weight_decay']:g}: {r['accuracy']:.1f}" for r in best)
        table.append([LABELS.get(arm, arm), tried])
    return _pipe(table, ["", "learning rate / weight decay: accuracy"])


def verdict(gap: Difference) -> str:
    """In a word."""
    if gap.count < 3:
        return "too few seeds"
    if abs(gap.mean) <= 2 * gap.error:
        return "tie"
    return "better" if gap.mean > 0 else "worse"


def _difference(among: Sequence[Group], arm: str, sparsity: float) -> Difference | None:
    ours, other = pick(among, OURS, sparsity), pick(among, arm, None if arm == "dense" else sparsity)
    return None if ours is None or other is None else difference(ours, other)


def _gap(among: Sequence[Group], arm: str, sparsity: float) -> str:
    gap = _difference(among, arm, sparsity)
    return "" if gap is None else f"{_shown(gap)} {verdict(gap)}"


def _shown(gap: Difference | None) -> str:
    if gap is None or not gap.count:
        return ""
    error = "" if math.isnan(gap.error) else f" ({gap.error:.2f})"
    return f"{gap.mean:+.2f}{error}"


def _mean(group: Group | None) -> str:
    if group is None:
        return ""
    spread = "" if math.isnan(group.deviation()) else f" ± {group.deviation():.1f}"
    return f"{group.mean():.1f}{spread} ({len(group.runs)})"


def _pipe(rows: Sequence[Sequence[object]], heads: list[str]) -> str:
    if not rows:
        return "Not measured yet."
    return str(tabulate(rows, heads, "pipe", disable_numparse=True))


def figure(data: str, what: str) -> str:
    """The figure, once there are runs to draw."""
    name = f"images/accuracy_{data}.png"
    return f"![{what}]({name})" if found(data) else "Not measured yet."


TABLES: dict[str, Callable[[], str]] = {
    "figure": lambda: figure("generated", "Error against MACs and parameters left, and the poster's curves"),
    "narrow_figure": lambda: figure("narrow", "Error of nets of half the width against MACs and parameters left"),
    "digits_figure": lambda: figure("digits", "Error on the digits against MACs and parameters left"),
    "progress": progress,
    "summary": lambda: summary("generated"),
    "accuracies": lambda: accuracies("generated"),
    "differences": lambda: differences("generated"),
    "parameters": lambda: parameters("generated"),
    "penalty": lambda: penalty("generated"),
    "digits": lambda: accuracies("digits"),
    "digits_differences": lambda: differences("digits"),
    "floor": lambda: floor("generated"),
    "narrow": lambda: accuracies("narrow"),
    "narrow_differences": lambda: differences("narrow"),
    "narrow_floor": lambda: floor("narrow"),
    "trials": trials,
    "confirmed": confirmed,
    "first_look": first_look,
    "tuning": lambda: tuning("generated", 32),
    "narrow_tuning": lambda: tuning("generated", NARROW),
    "digits_tuning": lambda: tuning("digits", 16),
}
