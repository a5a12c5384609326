"""The tables of README.md and docs/ that hold measured figures, made from the files in bench/results/.

    python -m bench.tables [--check]

A table stands between `<!-- table NAME -->` and `<!-- end of table -->`; this script fills every such place. Ratios
of which more is better are cut to their last digit, costs rounded up. `--check` changes nothing and exits with 1
where a table is not the one that the files give.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def pages() -> list[Path]:
    """The files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), RESULTS / "README.md"]


def rendered(text: str) -> str:
    """`text` with every table made anew.

    Raises:
        ValueError: an unknown table.
    """

    def fill(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"table: expected one of {', '.join(TABLES)}, got {match[2]!r}")
        return f"{match[1]}{TABLES[match[2]]()}\n{match[3]}"

    return PLACE.sub(fill, text)


def cut(value: float, digits: int = 2) -> str:
    """`value` with its further digits cut off.

    >>> cut(1.999), cut(0.25)
    ('1.99', '0.25')
    """
    scale = 10**digits
    return f"{math.floor(value * scale + 1e-9) / scale:.{digits}f}"


def cost(value: float) -> str:
    """`value` with its digits after the third rounded up.

    >>> cost(1.0557)
    '1.056'
    """
    return f"{math.ceil(1000 * value - 1e-9) / 1000:.3f}"


def pipe(rows: list[list[str]], heads: list[str], words: int = 1) -> str:
    """A Markdown table whose first `words` columns are words, the others figures."""
    align = ["left"] * words + ["right"] * (len(heads) - words)
    return tabulate(rows, heads, "pipe", colalign=align, disable_numparse=True)


def lines(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Provenance and rows of a JSON-lines file."""
    machine, *rows = map(json.loads, path.read_text().splitlines())
    return machine, rows


def source(path: Path, machine: dict[str, Any]) -> str:
    """A sentence that names the file and the conditions."""
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads, {machine['cpu_capability']}"
    return f"{where}, torch {machine['torch']}, commit {machine['commit']}: `bench/results/{path.name}`."


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
    """Sums over the convs of a network, and the worst error beside oneDNN's."""
    found, sources = [], []
    for path in sorted(RESULTS.glob("cpu_layers_*.jsonl")):
        machine, rows = lines(path)
        convs = [row for row in rows if row["conv"] != "sum"]
        worst = max(row["error"] / row["error_dense"] for row in convs)
        for row in rows:
            if row["conv"] == "sum":
                key = [row[name] for name in ("model", "block", "dtype", "arm")]
                times = [f"{row['base_ms']:.1f}", f"{row['arm_ms']:.1f}"]
                found.append([*key, f"{row['sparsity']:.0%}", f"{cut(row['median'])}x", *times, f"{worst:.2f}"])
        sources.append(source(path, machine))
    heads = ["model", "block", "dtype", "arm", "zero", "ratio", "dense ms", "sparse ms", "worst error / oneDNN's"]
    return "\n\n".join([pipe(found, heads, 5), *sources])


def arithmetic() -> str:
    """The report's totals beside the poster's rows."""
    data = json.loads((RESULTS / "arithmetic.json").read_text())
    rows = [
        [
            f"{row['row']}: {row['density_1_to_3']} / {row['density_4']}",
            f"{row['params_poster'] / 1e6:.2f} M",
            f"{row['params']:,} ({100 * row['params_off']:+.2f} %)",
            f"{row['macs_poster'] / 1e9:.2f} G",
            f"{row['macs']:,} ({100 * row['macs_off']:+.2f} %)",
        ]
        for row in data["results"]
    ]
    heads = ["row: density of stages 1-3 / 4", "params, poster", "params, report", "MACs, poster", "MACs, report"]
    return f"{pipe(rows, heads)}\n\nFrom `bench/results/arithmetic.json`."


def training() -> str:
    """What block scales cost in a training step."""
    path = RESULTS / "training_step.jsonl"
    machine, rows = lines(path)
    names = {"prepared": "prepared", "expanded": "scale expanded to the weight's shape in every forward"}
    table = [
        [
            names.get(row["arm"], row["arm"]),
            cost(row["ratio"]),
            f"{cost(row['low'])} to {cost(row['high'])}",
        ]
        for row in rows
    ]
    return f"{pipe(table, ['', 'time of a step over the dense one', 'quartiles'])}\n\n{source(path, machine)}"


def report() -> str:
    """What a report and its page cost, and on how many models its MACs agree with the counter."""
    path = RESULTS / "report_speed.json"
    data = json.loads(path.read_text())
    flops = json.loads((RESULTS / "report_flops.json").read_text())["results"]
    table = [[row["what"], f"{math.ceil(100 * row['seconds']) / 100:.2f} s"] for row in data["results"]]
    equal = sum(row["equal"] for row in flops)
    return (
        f"{pipe(table, ['', 'median of ' + str(data['rounds'])])}\n\n{source(path, data['provenance'])}\n\n"
        f"`FlopCounterMode` agrees with `macs_run` on {equal} of {len(flops)} torchvision models, each plain, prepared "
        "and converted: `bench/results/report_flops.json`."
    )


TABLES: dict[str, Callable[[], str]] = {
    "cpu": cpu,
    "cpu_layers": cpu_layers,
    "headline": headline,
    "arithmetic": arithmetic,
    "training": training,
    "report": report,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = [path for path in pages() if path.read_text() != rendered(path.read_text())]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'is not up to date' if args.check else 'written'}")
        if not args.check:
            path.write_text(rendered(path.read_text()))
    return int(args.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
