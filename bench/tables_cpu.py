"""The tables of the CPU engine, from the files of `bench.cpu` and `bench.cpu_layers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.tables_text import RESULTS, cut, lines, pipe, source


def cpu_files() -> list[tuple[Path, dict[str, Any], list[dict[str, Any]]]]:
    """The end-to-end files of `bench.cpu` with their rows."""
    found = []
    for path in sorted(RESULTS.glob("cpu_*.jsonl")):
        machine, rows = lines(path)
        rows = [row for row in rows if {"model", "masks", "batch", "block", "dtype", "arm", "median"} <= row.keys()]
        if rows:
            found.append((path, machine, rows))
    return found


def cpu_table(rows: list[dict[str, Any]]) -> str:
    """Ratios: a line for each model, block, type and batch, a column for each arm; dense arms have no block."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    ratios: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        key = tuple(str(row[name]) for name in ("model", "dtype", "batch", "block", "masks"))
        ratios.setdefault(key, {})[row["arm"]] = f"{cut(row['median'])}x"
    dense = {(*key[:3], key[4]): found for key, found in ratios.items() if key[3] == "-"}
    lines = {key: dense.get((*key[:3], key[4]), {}) | found for key, found in ratios.items() if key[3] != "-"}
    heads = [
        "model",
        "dtype",
        "batch",
        "block",
        "masks",
        *(f"{arm} zero" if "%" in arm else f"{arm} dense" for arm in arms),
    ]
    return pipe([[*key, *(found.get(arm, "") for arm in arms)] for key, found in lines.items()], heads, 5)


def cpu() -> str:
    """Every end-to-end file of the CPU engine."""
    files = cpu_files()
    rows = [row for _, _, found in files for row in found]
    return "\n\n".join([cpu_table(rows), *(source(path, machine) for path, machine, _ in files)])


def headline() -> str:
    """ResNet-50 with blocks of 32x32, for the README."""
    chosen = {"model": "resnet50", "block": ("32x32", "-")}
    files = []
    for path, machine, rows in cpu_files():
        few = [row for row in rows if row["model"] == chosen["model"] and row["block"] in chosen["block"]]
        few = [row for row in few if row["masks"] == "exact"]
        if any(row["block"] != "-" for row in few):
            files.append((path, machine, few))
    if not files:
        raise FileNotFoundError("no cpu_*.jsonl in bench/results holds ResNet-50 with blocks of 32x32")
    table = cpu_table([row for _, _, rows in files for row in rows])
    return "\n\n".join([table, *(source(path, machine) for path, machine, _ in files)])


def cpu_layers() -> str:
    """Ratios of sums over the convs of a network, of the conv that gains least, and the worst error beside oneDNN's."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    worst: dict[tuple[str, ...], float] = {}
    sources, zeros = [], dict[str, None]()
    for path in sorted(RESULTS.glob("cpu_layers_*.jsonl")):
        machine, rows = lines(path)
        for row in rows:
            key, zero = tuple(str(row[name]) for name in ("model", "block", "dtype", "arm")), f"{row['sparsity']:.0%}"
            if row["conv"] == "sum":
                same = [r for r in rows if r["conv"] != "sum" and r["sparsity"] == row["sparsity"]]
                least = min(r["median"] for r in same if (r["block"], r["arm"]) == (row["block"], row["arm"]))
                found.setdefault(key, {})[zero] = f"{cut(row['median'])}x ({cut(least)}x)"
                zeros[zero] = None
            else:
                worst[key] = max(worst.get(key, 0.0), row["error"] / row["error_dense"])
        sources.append(source(path, machine))
    heads = ["model", "block", "dtype", "arm", *(f"{zero} zero" for zero in zeros), "worst error / oneDNN's"]
    table = [[*key, *(of.get(zero, "") for zero in zeros), f"{worst[key]:.2f}"] for key, of in found.items()]
    return "\n\n".join([pipe(table, heads, 4), *sources])
