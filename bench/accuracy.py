"""Accuracy at equal epochs: fxdbsr's training against block pruning, channel pruning and smaller dense nets.

    python -m bench.accuracy run --plan floor --out bench/results/accuracy_generated.jsonl [--part 1/2]
    python -m bench.accuracy table bench/results/accuracy_generated.jsonl
    python -m bench.accuracy publish

`run` trains every setting of a plan (`bench/accuracy_plans.py`) that the file does not hold yet, and appends one JSON
line after each. Started again, it goes on where it stopped; several processes may share a plan by `--part`. Nets
train on a GPU where there is one, else on one thread. `publish` makes the figures and tables of docs/accuracy.md and
docs/trials.md anew from what bench/results/ holds by then.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from tabulate import tabulate

from bench.accuracy_arms import ARMS
from bench.accuracy_cost import accuracy, cost
from bench.accuracy_figure import draw
from bench.accuracy_nets import make_net
from bench.accuracy_page import DOCS, PAGES, rendered
from bench.accuracy_plans import PLANS
from bench.accuracy_records import Record, append, changes, key, key_of, read
from bench.accuracy_setting import Setting
from bench.accuracy_table import HEAD, rows
from bench.accuracy_words import records
from fxdbsr.paired import provenance


def run(setting: Setting) -> Record:
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


def run_all(settings: Iterable[Setting], out: Path) -> None:
    """Train what `out` does not hold yet."""
    if not out.exists():
        append(out, provenance())
    for setting in settings:
        if key_of(setting) in {key(record) for record in read(out)}:
            continue
        record = run(setting)
        append(out, record)
        print(f"{time.strftime('%H:%M')} {describe(record)}", flush=True)


def describe(record: Record) -> str:
    """One line for the log."""
    return f"{record['arm']} {changes(record)} {record['accuracy']:.2f} % at {record['sparsity_macs']:.3f}"


def publish() -> None:
    """The figures and the tables of the pages."""
    titles = {
        "generated": "generated images, 24 classes",
        "narrow": "generated images, half the width",
        "deep": "generated images, half the width, twice the depth",
        "digits": "scikit-learn's digits",
    }
    for data, title in titles.items():
        if runs := records(data):
            draw(runs, DOCS / "images" / f"accuracy_{data}.png", title, poster=data == "generated")
    for page in PAGES:
        page.write_text(rendered(page.read_text()))


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
    commands.add_parser("publish", help="draw the figures and fill the tables of docs/accuracy.md and docs/trials.md")
    args = parser.parse_args()
    if args.command == "run":
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        part, parts = (int(number) for number in args.part.split("/"))
        run_all(list(PLANS[args.plan]())[part - 1 :: parts], args.out)
        return
    if args.command == "publish":
        publish()
        return
    runs = [record for file in args.files for record in read(file)]
    head = [title.format(args.against) for title in HEAD]
    print(tabulate(rows(runs, args.against), head, tablefmt="pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
