"""The table of the Triton engine: whole networks on a GPU, from the file of `bench.gpu --part models`."""

from __future__ import annotations

import json
from typing import Any

from bench.tables_text import RESULTS, cut, pipe

PATH = RESULTS / "gpu.jsonl"
ARMS = {
    "sparse": "converted",
    "3xTF32": "converted, 3xTF32",
    "dense": "converted, dense",
    "default mode": "torch.compile, default mode",
    "eager": "eager",
}
OURS = ("sparse", "3xTF32")
CONVERTED = (*OURS, "dense")  # what depends on the masks: channels that are dead are removed from dense convs, too


def gpu() -> str:
    """Every network and arm."""
    return _table(tuple(ARMS))


def gpu_headline() -> str:
    """The converted networks, by sparse and by dense convs, for the README."""
    return _table(CONVERTED)


def _table(arms: tuple[str, ...]) -> str:
    """Ratios over torch.compile: a line for each network, block and arm, a column for each sparsity."""
    found: dict[tuple[str, ...], dict[int, str]] = {}
    records = [record for record in map(json.loads, PATH.read_text().splitlines()) if _is_network(record)]
    for record in records:
        key = record["key"]
        base = record["compiled by"]["compiled"].split(":")[0]
        for arm in (arm for arm in arms if f"{arm} over compiled" in record):
            blocks = (key["block"], key["masks"]) if arm in CONVERTED else ("-", "-")
            line = (key["model"], key["dtype"], str(key["batch"]), *blocks, ARMS[arm], base)
            left = f" ({100 * record['macs']:.0f} %)" if arm in OURS else ""
            ratio = f"{cut(record[f'{arm} over compiled'][1])}x{left}"
            found.setdefault(line, {}).setdefault(key["sparsity"], ratio)
    zeros = sorted({record["key"]["sparsity"] for record in records})
    heads = ["model", "dtype", "batch", "block", "masks", "arm", "over torch.compile"]
    rows = [[*line, *(cells.get(zero, "") for zero in zeros)] for line, cells in found.items()]
    table = pipe(rows, [*heads, *(f"{zero} % zero" for zero in zeros)], 7)
    return f"{table}\n\n{_source(records[0])}"


def _is_network(record: dict[str, Any]) -> bool:
    return record["key"]["part"] == "models" and bool(record["measured"])


def _source(record: dict[str, Any]) -> str:
    versions = f"torch {record['torch']}, Triton {record['triton']}, cuDNN {record['cudnn']}"
    return f"{record['device']}, {versions}, commit {record['commit']}: `bench/results/{PATH.name}`."
