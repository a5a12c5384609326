"""`fxdbsr convert MODEL -o FILE`: a prepared model's checkpoint to a file that runs block-sparse kernels."""

from __future__ import annotations

import argparse
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxdbsr import saving
from fxdbsr.api import convert
from fxdbsr.commands.output import add_json, check_outputs, put
from fxdbsr.commands.source import add_source, load_source
from fxdbsr.files import writing
from fxdbsr.kernels.choice import BACKENDS
from fxdbsr.nn.packed import PackedConv
from fxdbsr.reporting.build import report

EXAMPLES = """\
examples:
  a trained, prepared model to an exported program, for any batch size
    fxdbsr convert resnet50 --checkpoint best.pt --block 32x32 -o resnet50.pt2
  which runs without the model's source
    python -c "import fxdbsr, torch; model = torch.export.load('resnet50.pt2').module()"
  a plain checkpoint whose weights hold blocks of zeros; the packed tensors alone
    fxdbsr convert mypackage.models:small --checkpoint pruned.pt --block 8x8 --shape 1x3x32x32 -o small.safetensors
  to try it without a checkpoint
    fxdbsr convert resnet18 --block 32x32 --sparsity 0.7 -o resnet18.pt2
"""
SUFFIXES = {".pt2": "exported program", ".pt": "state dict", ".safetensors": "state dict"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    parser.epilog = EXAMPLES
    add_source(parser)
    add("-o", "--output", required=True, metavar="FILE", help=".pt2: exported program; .pt, .safetensors: state dict")
    add("--backend", choices=BACKENDS, default="auto", help="engine of the convs (default: %(default)s)")
    add("--tune", action="store_true", help="measure the engines of each layer instead of following a rule")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, hold the outputs against the prepared model's, and write the file."""
    output = Path(args.output)
    if output.suffix not in SUFFIXES:
        raise ValueError(f"--output: expected a name that ends in {', '.join(SUFFIXES)}, got {args.output!r}")
    check_outputs(args.output, args.json)
    source = load_source(args, prepared=True)
    model, x = source.model, torch.randn(source.shape)
    fast = convert(model, example_inputs=x, backend=args.backend, tune=args.tune)
    with torch.no_grad():
        expected, found = model.eval()(x), fast(x)
    if not isinstance(expected, Tensor):
        raise ValueError(f"{args.model}: expected a model that returns a tensor, got {type(expected).__name__}")
    with writing(output) as part:
        save(fast, x, part)
        size = part.stat().st_size
    dense, total = report(model, x).total, report(fast, x).total  # layers that are gone are in the first alone
    figures = {
        "output": str(output),
        "holds": SUFFIXES[output.suffix],
        "file_bytes": size,
        "engines": dict(Counter(m.engine for m in fast.modules() if isinstance(m, PackedConv))),
        "max_abs_error": float((expected - found).abs().max()),
        "max_abs_output": float(expected.abs().max()),
        "macs_dense": dense.macs_dense,
        "params_dense": dense.params_dense,
        "total": total.to_dict(),
    }
    if args.json != "-":
        put("-", summary(figures))
    if args.json is not None:
        put(args.json, json.dumps(figures, indent=2))
    return 0


def save(model: nn.Module, x: Tensor, path: Path) -> None:
    """`model` to `path`: an exported program for any batch size, loaded again and compared, or what `load` reads.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: no file of tensors describes the model.
        RuntimeError: the file computes something else than the model.
    """
    if path.suffix != ".pt2":
        saving.save(model, path)
    else:
        batch = torch.export.Dim("batch", min=1, max=4096)
        pair = torch.cat([x, x]) if len(x) == 1 else x  # a batch of 1 would be taken for a constant
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", "No complete tensor found")  # about buffers of no elements
            torch.export.save(torch.export.export(model, (pair,), dynamic_shapes=({0: batch},)), path)
            served, expected = torch.export.load(path).module()(pair), model(pair)
            # a model runs whole and a program layer by layer, so that sums may be rounded another way
            if not (served - expected).abs().max() <= torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max():
                raise RuntimeError("--output: the program read back from the file computes something else")


def summary(figures: dict[str, Any]) -> str:
    """`figures` in words."""
    total, macs_dense = figures["total"], figures["macs_dense"]
    packed = ", ".join(f"{count} by {engine}" for engine, count in figures["engines"].items()) or "none"
    saved = 1 - total["macs"] / macs_dense if macs_dense else 0.0
    return "\n".join(
        [
            f"{figures['output']}  {figures['holds']}, {figures['file_bytes']:,} bytes",
            f"MACs             {macs_dense:,} to {total['macs']:,} ({saved:.1%} less)",
            f"parameters       {figures['params_dense']:,} to {total['params']:,}",
            f"packed convs     {packed}",
            f"largest |error|  {figures['max_abs_error']:.2e}, of outputs up to {figures['max_abs_output']:.2e}",
        ]
    )
