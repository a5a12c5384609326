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

from bench.tables_cpu import cpu, cpu_layers, headline
from bench.tables_gpu import gpu, gpu_h100, gpu_headline, gpu_layers, gpu_training
from bench.tables_text import RESULTS, cost, lines, pipe, source

ROOT = Path(__file__).parents[1]
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
    "gpu": gpu,
    "gpu_headline": gpu_headline,
    "gpu_h100": gpu_h100,
    "gpu_layers": gpu_layers,
    "gpu_training": gpu_training,
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
