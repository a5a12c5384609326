"""The table of the Triton engine: whole networks on a GPU, from the file of `bench.gpu --part models`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.tables_text import RESULTS, cut, pipe

PATH, H100, REGRET = (RESULTS / name for name in ("gpu.jsonl", "gpu_h100.jsonl", "gpu_regret.json"))
ARMS = {
    "sparse": "converted",
    "3xTF32": "converted, 3xTF32",
    "dense": "converted, dense",
    "default mode": "torch.compile, default mode",
    "folded": "torch.compile, norms folded",
    "eager": "eager",
}
OURS = ("sparse", "3xTF32")
CONVERTED = (*OURS, "dense")  # what depends on the masks: channels that are dead are removed from dense convs, too
BATCH = 32  # of the README


def gpu() -> str:
    """Every network and arm."""
    return _table(PATH, tuple(ARMS))


def gpu_headline() -> str:
    """The converted networks, by sparse and by dense convs, for the README."""
    return _table(PATH, CONVERTED, BATCH)


def gpu_h100() -> str:
    """The converted networks on the GPU that the engine was tuned on, before what was added since."""
    return _table(H100, CONVERTED)


def gpu_training() -> str:
    """Milliseconds of a training step."""
    records = [r for r in _read(PATH) if r["key"]["part"] == "training" and r["measured"]]
    rows = [
        [
            r["key"]["model"],
            r["key"]["dtype"],
            str(r["batch"]),
            "yes" if r["key"]["compile"] else "no",
            f"{r['ms dense'][1]:.1f}",
            f"{r['ms prepared'][1]:.1f}",
            f"{r['ratio'][1]:.2f}x",
        ]
        for r in records
    ]
    heads = ["model", "dtype", "batch", "compiled", "dense, ms", "prepared, ms", "prepared over dense"]
    return f"{pipe(rows, heads, 4)}\n\n{_source(PATH, records)}"


def gpu_layers() -> str:
    """The convs of networks one by one: what the planner takes, the best, and cuDNN."""
    rows = [
        [
            row["gpu"],
            row["model"],
            row["block"],
            f"{row['sparsity']} %",
            *(f"{row[name]:.0f}" for name in ("cuDNN us", "taken us", "best us")),
            f"{cut(row['cuDNN us'] / row['taken us'])}x",
            f"{row['slower']}" + (f" (at most {100 * (row['worst'] - 1):.0f} %)" if row["slower"] else ""),
        ]
        for row in json.loads(REGRET.read_text())["networks"]
    ]
    heads = ["GPU", "model", "block", "zero", "cuDNN, us", "taken, us", "best, us", "over cuDNN", "slower"]
    return f"{pipe(rows, heads, 4)}\n\nFrom `bench/results/{REGRET.name}`."


def _table(path: Path, arms: tuple[str, ...], batch: int | None = None) -> str:
    """Ratios over torch.compile: a line for each network, block and arm, a column for each sparsity."""
    found: dict[tuple[str, ...], dict[int, str]] = {}
    records = [r for r in _read(path) if _is_network(r) and batch in (None, r["key"]["batch"])]
    for record in records:
        key = record["key"]
        base = record["compiled by"]["compiled"].split(":")[0]
        for arm in (arm for arm in arms if f"{arm} over compiled" in record):
            blocks = (key["block"], key["masks"]) if arm in CONVERTED else ("-", "-")
            line = (key["model"], key["dtype"], str(key["batch"]), *blocks, ARMS[arm], base)
            left = f" ({_left(record)})" if arm in OURS else ""
            ratio = f"{cut(record[f'{arm} over compiled'][1])}x{left}"
            found.setdefault(line, {}).setdefault(key["sparsity"], ratio)
    zeros = sorted({record["key"]["sparsity"] for record in records})
    heads = ["model", "dtype", "batch", "block", "masks", "arm", "over torch.compile"]
    rows = [[*line, *(cells.get(zero, "") for zero in zeros)] for line, cells in found.items()]
    table = pipe(rows, [*heads, *(f"{zero} % zero" for zero in zeros)], 7)
    return f"{table}\n\n{_source(path, records)}"


def _left(record: dict[str, Any]) -> str:
    """Percent of the MACs that the masks leave and, where that is less, that are left after conversion."""
    left = {f"{100 * record[name]:.0f}": None for name in ("macs", "macs after") if name in record}
    return f"{', '.join(left)} %"


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _is_network(record: dict[str, Any]) -> bool:
    return record["key"]["part"] == "models" and bool(record["measured"])


def _source(path: Path, records: Sequence[dict[str, Any]]) -> str:
    first, commits = records[0], list(dict.fromkeys(record["commit"] for record in records))
    made = f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    versions = f"torch {first['torch']}, Triton {first['triton']}, cuDNN {first['cudnn']}"
    return f"{first['device']}, {versions}, {made}: `bench/results/{path.name}`."
