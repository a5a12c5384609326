"""Means, spreads and paired differences of the runs in result files.

    python -m bench.accuracy table FILE... [--against gradual]

Runs of an arm that differ in nothing but the seed are a group. Two groups are compared over the seeds that both have:
the mean of the differences and its standard error (the deviation of the differences over the root of their number).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch

from bench.accuracy_records import Record
from bench.accuracy_setting import Setting

PLACE = ("data", "net", "width", "depth", "block", "epochs", "draw")


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone, by seed.

    Attributes:
        name: the arm, with the options of a lead and a gamma.
        place: data, net and epochs, as JSON.
        sparsity: asked for, of the convs' MACs; None where gamma sets it, or for the dense net.
        runs: a record for each seed.
    """

    name: str
    place: str
    sparsity: float | None
    runs: dict[int, Record]

    def values(self, key: str = "accuracy") -> list[float]:
        """Of all seeds, in their order."""
        return [float(self.runs[seed][key]) for seed in sorted(self.runs)]

    @property
    def width(self) -> int:
        """Channels of the nets' first stage, as the settings have it."""
        return int(self.runs[min(self.runs)]["width"])

    def mean(self, key: str = "accuracy") -> float:
        """Over the seeds."""
        return sum(self.values(key)) / len(self.runs)

    def deviation(self, key: str = "accuracy") -> float:
        """Standard deviation over the seeds; NaN for one."""
        return deviation(self.values(key))


@dataclass(frozen=True)
class Difference:
    """Accuracy of one group less that of another, over the `count` seeds that both have."""

    mean: float
    error: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.error:.2f})"


def groups(records: Iterable[Record]) -> list[Group]:
    """The groups, in the order of their first runs."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        same = {field.name: record[field.name] for field in fields(Setting) if field.name != "seed"}
        found[json.dumps(same, sort_keys=True)].append(record)
    return [
        Group(name(runs[0]), place(runs[0]), runs[0]["sparsity"], {run["seed"]: run for run in runs})
        for runs in found.values()
    ]


def name(record: Record) -> str:
    """The arm, its gamma and its options."""
    options = " ".join(f"{key}={value}" for key, value in record["options"])
    gamma = "" if record["gamma"] is None else f"gamma={record['gamma']}"
    return " ".join(part for part in (record["arm"], gamma, options) if part)


def place(record: Record) -> str:
    """What must be equal for two runs to be compared, as JSON."""
    return json.dumps({key: record[key] for key in PLACE})


def difference(group: Group, other: Group) -> Difference:
    """`group` less `other`, paired by seed."""
    seeds = sorted(set(group.runs) & set(other.runs))
    gaps = [group.runs[seed]["accuracy"] - other.runs[seed]["accuracy"] for seed in seeds]
    if not gaps:
        return Difference(math.nan, math.nan, 0)
    return Difference(sum(gaps) / len(gaps), deviation(gaps) / math.sqrt(len(gaps)), len(gaps))


def deviation(values: list[float]) -> float:
    """Sample standard deviation; NaN for fewer than two values."""
    return float(torch.tensor(values, dtype=torch.float64).std()) if len(values) > 1 else math.nan


def rows(records: Iterable[Record], against: str) -> list[list[Any]]:
    """One row a group: place, arm, sparsity, runs, accuracy, reached sparsities, difference from `against`."""
    found = groups(records)
    table: list[list[Any]] = []
    for group in found:
        others = [g for g in found if g.name == against and g.place == group.place and g.sparsity == group.sparsity]
        gap = str(difference(group, others[0])) if others and others[0] is not group else ""
        reached = [f"{group.mean(key):.3f}" for key in ("sparsity_macs", "sparsity_macs_needed", "sparsity_params")]
        accuracy = f"{group.mean():.2f} +- {group.deviation():.2f}"
        table.append([group.place, group.name, group.sparsity, len(group.runs), accuracy, *reached, gap])
    return table


HEAD = ("place", "arm", "asked", "runs", "accuracy %", "MACs zero", "MACs not needed", "params zero", "less {}")
