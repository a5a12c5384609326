"""The tables of docs/accuracy.md and docs/trials.md, made from the result files of bench/accuracy.py."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.accuracy_figure import LABELS
from bench.accuracy_page_default import early, knob_rows, later, rate, rates, schedule
from bench.accuracy_page_trials import confirmed, first_look, going, trials, tuning
from bench.accuracy_plans import PLANS, SEEDS
from bench.accuracy_records import key, key_of, read
from bench.accuracy_table import Difference, Group, difference, groups
from bench.accuracy_tuned import NARROW
from bench.accuracy_words import (
    OURS,
    RESULTS,
    SPARSITIES,
    gap_in_words,
    gap_to,
    mean_of,
    pick,
    pipe,
    records,
    shown,
    verdict,
)

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (DOCS / "accuracy.md", DOCS / "trials.md")
PLACE = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FIXED = ("scaled", "gradual", "gradual_layer", "once", "once_layer", "channels", "slim")


def rendered(text: str) -> str:
    """`text` with the tables between `<!-- NAME -->` and `<!-- end -->` made anew."""
    return PLACE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def found(data: str) -> list[Group]:
    """The groups of one data set."""
    return groups(records(data))


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
    table = [[LABELS[arm], *(mean_of(pick(among, arm, s)) for s in run_at(among))] for arm in FIXED]
    return f"Dense: {mean_of(dense)}. Percent of the test images, mean ± deviation (seeds).\n\n{pipe(table, heads)}"


def differences(data: str) -> str:
    """Our default less every other arm, paired by seed."""
    among = found(data)
    if not among:
        return "Not measured yet."
    heads = ["our default less", *(f"{sparsity:.0%}" for sparsity in run_at(among))]
    table = [[LABELS[arm], *(gap_in_words(among, arm, s) for s in run_at(among))] for arm in FIXED[1:]]
    table.append(["dense", *(gap_in_words(among, "dense", s) for s in run_at(among))])
    return pipe(table, heads)


def summary(data: str) -> str:
    """For every other arm in words where our default is better, worse, or level."""
    among = found(data)
    lines = []
    for arm in (*FIXED[1:], "dense"):
        words: dict[str, list[str]] = {}
        for sparsity in SPARSITIES:
            gap = gap_to(among, arm, sparsity)
            if gap is not None:
                words.setdefault(verdict(gap), []).append(f"{sparsity:.0%}")
        if words:
            told = "; ".join(f"{word} at {', '.join(where)}" for word, where in words.items())
            lines.append(f"- The default against {LABELS.get(arm, arm)}: {told}.")
    return "\n".join(lines) or "Not measured yet."


def drawn_anew() -> str:
    """The default against gradual pruning where every seed has images of its own; pairs share them."""
    among = groups(record | {"draw": None} for record in records("draws"))
    table = []
    defaults = (group for group in among if group.name == OURS)
    for ours in sorted(defaults, key=lambda group: (group.width, group.sparsity)):
        theirs = next(
            (g for g in among if (g.name, g.place, g.sparsity) == ("gradual", ours.place, ours.sparsity)), None
        )
        if theirs is not None and (gap := difference(ours, theirs)).count:
            what = f"{ours.width}, {2 * ours.width}, {4 * ours.width} channels, {ours.sparsity:.0%} of the MACs zero"
            table.append([what, mean_of(ours), mean_of(theirs), shown(gap), verdict(gap)])
    return pipe(table, ["", "ours", "gradual pruning, global", "difference", ""])


def parameters(data: str) -> str:
    """Parameters that are zero at the sparsities of the MACs."""
    among = found(data)
    heads = ["parameters zero at", *(f"{sparsity:.0%} of the MACs" for sparsity in SPARSITIES)]
    picked = {arm: [pick(among, arm, s) for s in SPARSITIES] for arm in FIXED}
    table = [
        [LABELS[arm], *(f"{group.mean('sparsity_params'):.1%}" if group else "" for group in line)]
        for arm, line in picked.items()
    ]
    return pipe(table, heads)


def progress() -> str:
    """How many runs of each plan the result files hold."""
    done = {key(record) for file in RESULTS.glob("accuracy_*.jsonl") for record in read(file)}
    table = []
    for name, plan in PLANS.items():
        wanted = {key_of(setting) for setting in plan()}
        table.append([f"`{name}`", str(plan.__doc__), f"{len(wanted & done)} of {len(wanted)}"])
    return pipe(table, ["plan", "what it runs", "runs done"])


def penalty(data: str) -> str:
    """The authors' form, whose gamma sets the sparsity."""
    table = [
        [group.runs[min(group.runs)]["gamma"], f"{group.mean('sparsity_macs'):.1%}", mean_of(group)]
        for group in found(data)
        if group.name.startswith("clamp ")
    ]
    return pipe(sorted(table), ["gamma", "MACs zero", "accuracy"])


def floor(data: str) -> str:
    """What the default has to reach, and whether it does."""
    among = found(data)
    asked: list[tuple[str, Difference | None, float]] = []
    for s in run_at(among):
        gap = gap_to(among, "gradual", s)
        noise = -2 * gap.error if gap and gap.error <= 0.5 else math.nan
        asked.append(
            (f"at {s:.0%}: not below gradual global pruning by more than 2 errors, each at most 0.5", gap, noise)
        )
    for s, least in ((0.7, 2.0), (0.9, 8.0)):
        for arm in ("once", "once_layer"):
            asked.append((f"at {s:.0%}: {least:g} points over {LABELS[arm]}", gap_to(among, arm, s), least))
    asked.append(("at 50%: at most 0.5 points under dense", gap_to(among, "dense", 0.5), -0.5))
    for s, least in ((0.7, 1.0), (0.9, 3.0)):
        gaps = [gap for arm in FIXED[1:] if (gap := gap_to(among, arm, s)) is not None]
        best = min(gaps, key=lambda gap: gap.mean, default=None)
        asked.append((f"goal at {s:.0%}: {least:g} points over the best other arm", best, least))
    table = [[what, shown(gap), _holds(gap, least)] for what, gap, least in asked]
    return pipe(table, ["", "difference", "holds"])


def _holds(gap: Difference | None, least: float) -> str:
    if gap is None or gap.count < len(SEEDS):
        return f"not known: {gap.count if gap else 0} of {len(SEEDS)} seeds"
    if math.isnan(least):
        return "not known: the error is larger"
    return "yes" if gap.mean >= least else "no"


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
    "digits_penalty": lambda: penalty("digits"),
    "digits": lambda: accuracies("digits"),
    "digits_differences": lambda: differences("digits"),
    "floor": lambda: floor("generated"),
    "narrow": lambda: accuracies("narrow"),
    "narrow_differences": lambda: differences("narrow"),
    "drawn_anew": drawn_anew,
    "narrow_floor": lambda: floor("narrow"),
    "deep_figure": lambda: figure("deep", "Error of deeper nets of half the width against MACs and parameters left"),
    "deep": lambda: accuracies("deep"),
    "deep_differences": lambda: differences("deep"),
    "deep_floor": lambda: floor("deep"),
    "early": early,
    "schedule": schedule,
    "later": later,
    "rate": rate,
    "deep_rates": rates,
    "knobs": knob_rows,
    "trials": trials,
    "confirmed": confirmed,
    "first_look": first_look,
    "tuning": lambda: tuning("generated", 32),
    "narrow_tuning": lambda: tuning("generated", NARROW),
    "deep_tuning": lambda: tuning("generated", NARROW, 2),
    "deep_going": going,
    "digits_tuning": lambda: tuning("digits", 16),
}
