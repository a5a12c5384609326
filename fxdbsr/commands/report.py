"""`fxdbsr report MODEL`: the table of a model, and its other forms as files."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from fxdbsr.api import convert
from fxdbsr.commands.output import add_json, check_outputs, put
from fxdbsr.commands.source import add_source, load_source
from fxdbsr.kernels.choice import BACKENDS
from fxdbsr.reporting.build import report
from fxdbsr.reporting.drawing import FORMATS

EXAMPLES = """\
examples:
  what a model costs, layer by layer
    fxdbsr report resnet50
  what half of the blocks would save, as a page to look at
    fxdbsr report resnet50 --block 32x32 --sparsity 0.5 --html resnet50.html
  which engine runs each layer after convert, and how long each takes
    fxdbsr report resnet18 --block 32x32 --sparsity 0.7 --convert --measure --shape 8x3x224x224
  a model of your own with trained weights; the stages with the most MACs first
    fxdbsr report mypackage.models:small --shape 1x3x32x32 --checkpoint best.pt --depth 1 --sort macs
  for a script
    fxdbsr report resnet50 --json | python -m json.tool
"""
TEXTS = ("csv", "markdown", "dot")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    parser.epilog = EXAMPLES
    add_source(parser)
    add("--convert", nargs="?", const="auto", choices=BACKENDS, help="convert, for this backend (auto)")
    add("--measure", action="store_true", help="time every layer and its dense form")
    add("--sort", metavar="FIELD", help="macs, params, bytes, sparsity, saved, ms, name, ...; the largest first")
    add("--depth", type=int, help="sum layers that agree in so many parts of their names")
    add("--only-changed", action="store_true", help="only layers with zero blocks")
    add("--width", type=int, help="characters of a line (default: the terminal's, or 120)")
    add_json(parser, "the report")
    for kind in TEXTS:
        add(f"--{kind}", metavar="PATH", help=f"write {kind} there; - for stdout, in place of the table")
    add("--html", metavar="PATH", help="write a page there")
    add(
        "--history",
        type=Path,
        metavar="FILE",
        help="JSON lines of the training, drawn on the page (default: the checkpoint's)",
    )
    add("--graph", metavar="PATH", help="draw the graph there: .svg, .png or .pdf")


def run(args: argparse.Namespace) -> int:
    """Make the report and write it where `args` say."""
    texts = {kind: getattr(args, kind) for kind in ("json", *TEXTS) if getattr(args, kind) is not None}
    check_outputs(*texts.values(), args.html, args.graph)
    if args.graph is not None and not args.graph.lower().endswith(FORMATS):
        raise ValueError(f"--graph: expected a name that ends in .svg, .png or .pdf, got {args.graph!r}")
    if args.history is not None and args.html is None:
        raise ValueError("--history: is drawn on the page, so it goes with --html")
    history = [] if args.history is None else read_history(args.history)
    source = load_source(args, prepared=args.convert is not None)
    x = torch.randn(source.shape)
    model = source.model if args.convert is None else convert(source.model, example_inputs=x, backend=args.convert)
    found = report(model, x, measure=args.measure)
    table = found.table(args.sort, args.depth, args.only_changed, args.width or line_width())
    if "-" not in texts.values():
        put("-", table)
    for kind, path in texts.items():
        put(path, getattr(found, f"to_{kind}")())
    if args.html is not None:
        found.save_html(args.html, history or source.history)
    if args.graph is not None:
        found.save_graph(args.graph)
    return 0


def line_width() -> int:
    """Columns of the terminal; 120 where stdout is none."""
    return shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 120


def read_history(path: Path) -> list[Any]:
    """The entries of the JSON-lines file `path`.

    Raises:
        OSError: it cannot be read. ValueError: a line is no JSON object.
    """
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"--history: {path}, line {number}: {error}") from error
        if not isinstance(entries[-1], dict):
            raise ValueError(f"--history: {path}, line {number}: expected an object, got {line.strip()[:40]}")
    return entries
