"""`fxdbsr train`: train a net to block sparsity, on one process or under torchrun."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from fxdbsr.commands.output import add_json, check_outputs, put
from fxdbsr.training.arguments import add_options, options_of
from fxdbsr.training.options import Options
from fxdbsr.training.processes import Processes, processes
from fxdbsr.training.run import Run

EXAMPLES = """\
examples:
  fxdbsr train --data digits --model resnet20 --block 8x8 --target 0.5
  fxdbsr train --recipe resnet20-cifar100 --data-dir ~/data
  torchrun --nproc-per-node 8 -m fxdbsr train --recipe resnet50-imagenet --data-dir /data/imagenet
  fxdbsr train --config my.toml --resume

Every epoch prints a JSON line and writes last.pt; best.pt is the best epoch whose mask is final. --json gives what was
reached as JSON, in place of words on stderr.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = EXAMPLES
    add_options(parser)
    add_json(parser, "what was reached")


def run(args: argparse.Namespace) -> int:
    """Train as `args` say; JSON lines on stdout, progress and words on stderr."""
    options = options_of(args)
    check_outputs(args.json)
    with processes(options.device) as team:
        history = train(options, team)
        if team.is_first:
            figures = reached(options, history)
            if args.json != "-":
                print(summary(figures), file=sys.stderr)
            if args.json is not None:
                put(args.json, json.dumps(figures))
    return 0


def train(options: Options, team: Processes) -> list[dict[str, Any]]:
    """Train as `options` say, among the processes of `team`; an entry for every epoch."""
    with folder(Path(options.out).expanduser()) if team.is_first else nullcontext():
        return _train(options, team)


@contextmanager
def folder(path: Path) -> Iterator[None]:
    """Make the folder `path` where it is missing; it goes again where the body raises before it wrote a file there."""
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):
                path.rmdir()
        raise


def _train(options: Options, team: Processes) -> list[dict[str, Any]]:
    team.wait()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default", UserWarning)
        training = Run(options, team)
    for warning in told if team.is_first else ():
        print(f"fxdbsr train: {warning.message}", file=sys.stderr)
    while training.epoch < options.epochs:
        with Progress(team, training) as progress:
            entry = training.train_epoch(progress.step)
        if team.is_first:
            print(json.dumps(entry), flush=True)
    return training.history


def reached(options: Options, history: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a training that is done: its best epoch, its last, and where its files lie."""
    final = [entry for entry in history if entry["frozen"]]
    best = max(final, key=lambda entry: entry["accuracy"])  # the first of those that are equal, as best.pt
    files = {name: str(Path(options.out).expanduser() / name) for name in ("best.pt", "last.pt", "log.jsonl")}
    return {"best": best, "last": history[-1], "of": options.of, "files": files}


def summary(figures: dict[str, Any]) -> str:
    """`figures` in words."""
    best, of = figures["best"], figures["of"]
    zero = f"{best[f'{of}_sparsity']:.1%} of the {'MACs' if of == 'macs' else of} zero"
    wrote = ", ".join(figures["files"].values())
    return f"best accuracy {best['accuracy']:.2%} in epoch {best['epoch']}, {zero}\nwrote {wrote}"


class Progress:
    """A bar of the steps of one epoch, on stderr where that is a terminal."""

    def __init__(self, team: Processes, training: Run) -> None:
        self.shown = team.is_first and sys.stderr.isatty()
        self.total, self.epoch = len(training.data.train), training.epoch + 1
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if self.shown:
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, desc=f"epoch {self.epoch}", unit="step", leave=False, dynamic_ncols=True)
        return self

    def step(self) -> None:
        """One step more."""
        if self.bar is not None:
            self.bar.update()

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
