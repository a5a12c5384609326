"""Accuracy at equal epochs: fxdbsr's training against block pruning, channel pruning and smaller dense nets.

    python -m bench.accuracy run --plan floor --out bench/results/accuracy_generated.jsonl [--part 1/2]
    python -m bench.accuracy table bench/results/accuracy_generated.jsonl
    python -m bench.accuracy figure bench/results/accuracy_generated.jsonl --png bench/results/accuracy_generated.png

`run` trains every setting of a plan (`bench/accuracy_plans.py`) that the file does not hold yet, and appends one JSON
line after each. Started again, it goes on where it stopped; several processes may share a plan by `--part`. Nets
train on a GPU where there is one, else on one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from bench.accuracy_arms import ARMS
from bench.accuracy_figure import draw
from bench.accuracy_plans import PLANS
from bench.accuracy_table import HEAD, rows
from bench.accuracy_training import Setting, accuracy, cost, make_net
from bench.paired import provenance


def key(record: dict[str, Any]) -> str:
    """What tells one setting from another: the fields of `Setting` in a record."""
    named = {field.name: record[field.name] for field in fields(Setting)}
    return json.dumps(named, sort_keys=True)


def run(setting: Setting) -> dict[str, Any]:
    """Train one net; its setting, accuracy in percent, costs and seconds.

    `sparsity_macs` and `sparsity_params` are the fractions of the dense net's convs, the stem left out.
    """
    start = time.process_time()
    model = ARMS[setting.arm](setting)
    seconds = time.process_time() - start
    found, whole = cost(model, setting), cost(make_net(setting), setting)
    return asdict(setting) | {
        "accuracy": round(accuracy(model, setting), 3),
        "sparsity_macs": round(1 - found["macs"] / whole["macs"], 5),
        "sparsity_macs_needed": round(1 - found["macs_needed"] / whole["macs"], 5),
        "sparsity_params": round(1 - found["params"] / whole["params"], 5),
        "macs_net": found["macs_net"],
        "params_net": found["params_net"],
        "cpu_seconds": round(seconds, 1),
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a result file; lines of provenance, and one that a killed run left half-written, are skipped."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "accuracy" in record:
            records.append(record)
    return records


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line, whole or not at all as far as other processes see."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record) + "\n").encode()
    with path.open("ab") as file:
        if file.tell() and path.read_bytes()[-1:] != b"\n":
            line = b"\n" + line
        file.write(line)


def run_all(settings: Iterable[Setting], out: Path) -> None:
    """Train what `out` does not hold yet."""
    if not out.exists():
        append(out, provenance())
    for setting in settings:
        name = key(json.loads(json.dumps(asdict(setting))))
        if name in {key(record) for record in read(out)}:
            continue
        record = run(setting)
        append(out, record)
        print(f"{time.strftime('%H:%M')} {describe(record)}", flush=True)


def describe(record: dict[str, Any]) -> str:
    """One line for the log."""
    plain = Setting("", 0)
    changed = {
        field.name: record[field.name]
        for field in fields(Setting)
        if field.name != "arm" and record[field.name] != json.loads(json.dumps(getattr(plain, field.name)))
    }
    return f"{record['arm']} {changed} {record['accuracy']:.2f} % at {record['sparsity_macs']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="train the arms of the comparison, and show what came out")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("run", help="train what a plan asks for and the file lacks")
    training.add_argument("--plan", choices=sorted(PLANS), required=True)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--part", default="1/1", metavar="K/N", help="every N-th setting, from the K-th")
    table = commands.add_parser("table", help="print means, spreads and paired differences")
    table.add_argument("files", type=Path, nargs="+")
    table.add_argument("--against", default="gradual", help="the arm to subtract (default gradual)")
    figure = commands.add_parser("figure", help="draw the error against MACs and parameters")
    figure.add_argument("files", type=Path, nargs="+")
    figure.add_argument("--png", type=Path, required=True)
    figure.add_argument("--title", default="generated images")
    args = parser.parse_args()
    if args.command == "run":
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        part, parts = (int(number) for number in args.part.split("/"))
        run_all(list(PLANS[args.plan]())[part - 1 :: parts], args.out)
        return
    records = [record for file in args.files for record in read(file)]
    if args.command == "table":
        head = [title.format(args.against) for title in HEAD]
        print(tabulate(rows(records, args.against), head, tablefmt="pipe", disable_numparse=True))
    else:
        draw(records, args.png, args.title)


if __name__ == "__main__":
    main()
