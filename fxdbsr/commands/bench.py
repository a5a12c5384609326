"""`fxdbsr bench MODEL`: how much faster the converted model is, side by side with the dense one in this process."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fxdbsr.api import convert, prepare
from fxdbsr.commands.output import add_json, check_outputs, put
from fxdbsr.commands.source import default_shape, load_model, parse_block, parse_shape
from fxdbsr.commands.spread import spread_mask
from fxdbsr.kernels.choice import BACKENDS
from fxdbsr.layers import blocked_layers
from fxdbsr.paired import as_row, paired, provenance
from fxdbsr.reporting.build import report

EXAMPLES = """\
examples:
  fxdbsr bench resnet50 --sparsity 0.5,0.7,0.9 --batch 1,8
  against eager PyTorch only (torch.compile needs a C++ compiler on CPUs)
    fxdbsr bench resnet18 --sparsity 0.7 --against eager
  a model of your own, on four threads, as JSON lines
    fxdbsr bench mypackage.models:small --shape 1x3x32x32 --block 8x8 --threads 4 --json

The same fraction of blocks is off in every conv, spread evenly over its rows and columns; channels that are dead all
the same are removed, and the MACs say what is run. Convs on images with up to 4 channels stay whole. Times are in ms,
ratios the time of the dense model over that of the converted one: medians and quartiles of interleaved pairs.
"""
AGAINST = ("eager", "compiled")
IMAGE_CHANNELS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    parser.epilog = EXAMPLES
    add("model", metavar="MODEL", help="torchvision name, resnet20, vgg11-cifar, or package.module:callable")
    add("--sparsity", default="0.5,0.7,0.9", metavar="S,...", help="fractions of the blocks (default: %(default)s)")
    add("--batch", default="1", metavar="N,...", help="batch sizes (default: %(default)s)")
    add("--shape", metavar="NxCxHxW", help="of the input, whose N --batch replaces (default: what the model is for)")
    add("--block", default="32x32", metavar="OUTxIN", help="size of the blocks (default: %(default)s)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="(default: %(default)s)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--backend", choices=BACKENDS, default="auto", help="engine of the convs (default: %(default)s)")
    add("--tune", action="store_true", help="measure the engines of each layer before")
    add("--against", default="eager,compiled", metavar="A,...", help="dense models (default: %(default)s)")
    add("--pairs", type=int, default=10, help="timed pairs for each ratio (default: %(default)s)")
    add("--threads", type=int, help="torch's threads (default: as set)")
    add("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    add_json(parser, "provenance and rows, one a line,")


def run(args: argparse.Namespace) -> int:
    """Measure what `args` ask for; the table or JSON lines."""
    check_outputs(args.json)
    sparsities, batches = fractions(args.sparsity), counts(args.batch, "--batch")
    shape = default_shape(args.model) if args.shape is None else parse_shape(args.shape)
    block, against = parse_block(args.block), args.against.split(",")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_against(against, device)
    if args.pairs < 1 or (args.threads is not None and args.threads < 1):
        raise ValueError(f"--pairs, --threads: expected at least 1, got {args.pairs}, {args.threads}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    layout = torch.channels_last if len(shape) == 4 else torch.preserve_format
    dense = load_model(args.model).eval().to(device, dtype).to(memory_format=layout)
    rows: list[dict[str, Any]] = []
    for batch in batches:
        x = torch.randn(batch, *shape[1:], device=device, dtype=dtype).to(memory_format=layout)
        macs_dense = report(dense, x).total.macs_run  # of `dense`, as layers that are gone are in no row of `fast`
        bases = {name: frozen(dense, x) if name == "compiled" else partial(dense, x) for name in against}
        for sparsity in sparsities:
            fast = converted(dense, x, block, sparsity, args.backend, args.tune)
            key = {"model": args.model, "batch": batch, "block": args.block, "dtype": args.dtype, "sparsity": sparsity}
            rows += compared(bases, fast, x, key | {"macs_dense": macs_dense}, args.pairs)
    if args.json != "-":
        put("-", table(rows, device))
    if args.json is not None:
        put(args.json, "\n".join(json.dumps(row) for row in (provenance(), *rows)))
    return 0


def check_against(names: list[str], device: torch.device) -> None:
    """Refuse what `--against` cannot name, or what cannot run here.

    Raises:
        ValueError: an unknown name. RuntimeError: torch.compile without a compiler.
    """
    if any(name not in AGAINST for name in names):
        raise ValueError(f"--against: expected {' or '.join(AGAINST)}, or both, got {','.join(names)!r}")
    if "compiled" in names and device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise RuntimeError("--against: torch.compile needs a C++ compiler and none is here; say --against eager")


def compared(
    bases: dict[str, Callable[[], Any]], fast: nn.Module, x: Tensor, key: dict[str, Any], pairs: int
) -> list[dict[str, Any]]:
    """A row for each of `bases` against `fast(x)`, with `key` and the MACs that run; progress on stderr."""
    macs_run = report(fast, x).total.macs_run
    rows = []
    for name, base in bases.items():
        with torch.inference_mode():
            ratio = paired(synchronised(base, x.device), synchronised(partial(fast, x), x.device), pairs)
        rows.append(key | {"against": name, "macs_run": macs_run} | as_row(ratio))
        print(f"batch {key['batch']}, sparsity {key['sparsity']:.0%}, {name}: done", file=sys.stderr, flush=True)
    return rows


def fractions(text: str) -> list[float]:
    """[0.5, 0.7] for "0.5,0.7".

    Raises:
        ValueError: anything but fractions from 0 to below 1.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= value < 1 for value in found):
        raise ValueError(f"--sparsity: expected fractions from 0 to below 1 like 0.5,0.9, got {text!r}")
    return found


def counts(text: str, option: str) -> list[int]:
    """[1, 8] for "1,8".

    Raises:
        ValueError: anything but positive ints.
    """
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option}: expected positive ints like 1,8, got {text!r}")
    return [int(part) for part in parts]


def converted(
    dense: nn.Module,
    x: Tensor,
    block: tuple[int | None, int | None],
    sparsity: float,
    backend: str,
    tune: bool,
    cover: bool = False,
    pointwise: bool = False,
) -> nn.Module:
    """`dense` converted, with `sparsity` of the blocks off: of every conv but those on images, or of the 1x1 ones."""

    def has_blocks(layer: nn.Module, name: str) -> bool:
        fits = not pointwise or getattr(layer, "kernel_size", None) == (1, 1)
        return fits and getattr(layer, "in_channels", 99) > IMAGE_CHANNELS

    prepared = prepare(dense, block, filter_fn=has_blocks)
    generator = torch.Generator().manual_seed(0)
    for layer in blocked_layers(prepared):
        layer.set_mask(spread_mask(layer.grid.shape, sparsity, generator, cover).to(layer.mask.device))
    return convert(prepared, example_inputs=x, backend=backend, tune=tune)


def frozen(dense: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A call of `dense` compiled by inductor, with its weights frozen: norms folded, convs prepacked."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=True), torch.inference_mode():
        compiled = torch.compile(copy.deepcopy(dense))
        compiled(x)
    return partial(compiled, x)


def synchronised(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`call`, and on an accelerator the wait for its end."""
    if device.type == "cpu":
        return call

    def waits() -> None:
        call()
        torch.accelerator.synchronize()

    return waits


def table(rows: list[dict[str, Any]], device: torch.device) -> str:
    """`rows` for people, with the conditions below."""
    heads = ["batch", "sparsity", "MACs run", "against", "dense ms", "sparse ms", "ratio", "quartiles"]
    lines = [
        [
            row["batch"],
            f"{row['sparsity']:.0%}",
            f"{row['macs_run'] / row['macs_dense']:.0%}",
            row["against"],
            f"{row['base_ms']:.2f}",
            f"{row['arm_ms']:.2f}",
            f"{row['median']:.2f}",
            f"{row['low']:.2f} to {row['high']:.2f}",
        ]
        for row in rows
    ]
    first, machine = rows[0], provenance()
    name = (
        machine["gpu"] if device.type == "cuda" else f"{machine['processor']}, {counted(machine['threads'], 'thread')}"
    )
    align = ["right", "right", "right", "left", "right", "right", "right", "left"]
    return "\n".join(
        [
            f"{first['model']}, blocks {first['block']}, {first['dtype']}, {name}, torch {machine['torch']}",
            "",
            tabulate(lines, heads, "simple", colalign=align, disable_numparse=True),
            "",
            "ratio: time of the dense model over that of the converted one, above 1 the converted one is faster;",
            f"median and quartiles of {counted(first['pairs'], 'interleaved pair')}. MACs run: of the dense model's.",
        ]
    )


def counted(number: int, what: str) -> str:
    """ "1 thread", "2 threads"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
