"""`fxdbsr report MODEL`: the report of a torchvision model, or of one that a function makes."""

from __future__ import annotations

import argparse
import difflib
import sys
from importlib import import_module
from pathlib import Path

import torch
import torchvision
from torch import nn

from fxdbsr.config import BlockSize
from fxdbsr.kernels.choice import BACKENDS
from fxdbsr.reporting.result import Report

EXAMPLES = """\
examples:
  fxdbsr report resnet50
  fxdbsr report resnet50 --block 32x32 --sparsity 0.5
  fxdbsr report resnet50 --block 32x32 --sparsity 0.7 --convert --measure --shape 8x3x224x224
  fxdbsr report vit_b_16 --depth 3 --sort macs
  fxdbsr report mypackage.models:small --shape 1x3x32x32 --json report.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    parser.epilog = EXAMPLES
    add("model", metavar="MODEL", help="a torchvision name, or package.module:callable that returns a module")
    add("--checkpoint", type=Path, metavar="FILE", help="load this state dict into the model")
    add("--shape", default="1x3x224x224", metavar="NxCxHxW", help="of the input (default: %(default)s)")
    add("--block", metavar="OUTxIN", help="prepare with such blocks; 'all' is the whole axis: 1xall")
    add("--sparsity", type=float, metavar="S", help="prune this fraction of every layer's blocks (0 to 1)")
    add("--score", choices=("l2", "random"), default="l2", help="blocks to prune (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and of random pruning (default: %(default)s)")
    add("--convert", nargs="?", const="auto", choices=BACKENDS, help="convert, for this backend (auto)")
    add("--measure", action="store_true", help="time every layer and its dense form")
    add("--sort", metavar="FIELD", help="macs, params, bytes, sparsity, saved, ms, name, ...")
    add("--depth", type=int, help="sum layers that agree in so many parts of their names")
    add("--only-changed", action="store_true", help="only layers with zero blocks")
    add("--width", type=int, default=120, help="characters of a line (default: %(default)s)")
    for kind in ("json", "csv", "markdown", "dot"):
        add(f"--{kind}", metavar="PATH", help=f"write {kind} there; - for stdout, in place of the table")
    add("--html", metavar="PATH", help="write a page there")


def run(args: argparse.Namespace) -> int:
    """Make the report and write it where `args` say."""
    shape = parse_shape(args.shape)
    block = None if args.block is None else parse_block(args.block)
    torch.manual_seed(args.seed)
    model = load_model(args.model)
    if args.checkpoint is not None:
        load_checkpoint(model, args.checkpoint)
    report = _report(_lowered(model, args, block), shape, args.measure)
    table = report.table(args.sort, args.depth, args.only_changed, args.width)
    forms = {kind: getattr(args, kind) for kind in ("json", "csv", "markdown", "dot")}
    if "-" not in forms.values():
        print(table)
    for kind, path in forms.items():
        if path is not None:
            text = str(getattr(report, f"to_{kind}")()).rstrip("\n") + "\n"
            sys.stdout.write(text) if path == "-" else Path(path).write_text(text)
    if args.html is not None:
        report.save_html(args.html)
    return 0


def _lowered(model: nn.Module, args: argparse.Namespace, block: BlockSize | None) -> nn.Module:
    """`model` prepared, pruned and converted as `args` say."""
    face = import_module("fxdbsr")
    if block is None and args.sparsity is None and args.convert is None:
        return model
    prepared: nn.Module = face.prepare(model, (32, 32) if block is None else block)
    if args.sparsity is not None:
        generator = torch.Generator().manual_seed(args.seed)
        face.block_prune_(prepared, args.sparsity, score=args.score, generator=generator)
    if args.convert is None:
        return prepared
    converted: nn.Module = face.convert(prepared, backend=args.convert)
    return converted


def _report(model: nn.Module, shape: tuple[int, ...], measure: bool) -> Report:
    from fxdbsr.reporting.build import report

    return report(model, torch.randn(shape), measure=measure)


def parse_shape(text: str) -> tuple[int, ...]:
    """(1, 3, 224, 224) for "1x3x224x224".

    Raises:
        ValueError: anything but positive ints between x.
    """
    parts = text.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--shape: expected positive ints like 1x3x224x224, got {text!r}")
    return tuple(int(part) for part in parts)


def parse_block(text: str) -> BlockSize:
    """(32, 16) for "32x16", (8, 8) for "8", (1, None) for "1xall".

    Raises:
        ValueError: anything else.
    """
    parts = text.lower().split("x")
    sizes = [None if part == "all" else int(part) if part.isdecimal() else 0 for part in parts]
    if len(sizes) > 2 or 0 in sizes:
        raise ValueError(f"--block: expected OUTxIN like 32x32 or 1xall, got {text!r}")
    return sizes[0], sizes[-1]


def load_model(name: str) -> nn.Module:
    """The torchvision model `name` with fresh weights, or what `package.module:callable` returns.

    Raises:
        ValueError: no such model; near names are told.
        TypeError: the callable returns something else.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        known = torchvision.models.list_models()
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ", see torchvision.models.list_models()"
            raise ValueError(f"torchvision has no model {name!r}{hint}")
        quick = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        found: nn.Module = torchvision.models.get_model(name, weights=None, **quick)
        return found
    sys.path.insert(0, "")
    try:
        make = getattr(import_module(module), attribute, None)
    finally:
        sys.path.remove("")
    if make is None:
        raise ValueError(f"{module} has no {attribute!r}")
    made = make() if callable(make) and not isinstance(make, nn.Module) else make
    if not isinstance(made, nn.Module):
        raise TypeError(f"{name}: expected a callable that returns an nn.Module, got {type(made).__name__}")
    return made


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load the state dict in the file `path`, tensors only, into `model`.

    Raises:
        OSError, ValueError: the file cannot be read, or its names or shapes are others.
    """
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"--checkpoint: {path}: {error}") from error
