"""Converted models on a CPU, end to end: against inductor-frozen dense, eager dense and ONNX Runtime.

    python -m bench.cpu --models resnet50 --batch 1,8 --sparsity 0,0.5,0.7,0.9 --block 32x32 --json FILE

The base is `torch.compile` with freezing (inductor: batch norms folded, weights prepacked for oneDNN, pointwise
operators fused), channels last. Every other arm is timed against it in interleaved pairs (base, arm, arm, base); the
ratio is the median over pairs, with quartiles, above 1 where the arm is faster. All arms of a batch size live in one
process. The same fraction of the blocks of every conv is off, spread evenly over rows and columns; the stem and the
classifier keep dense weights. Where a layer keeps fewer blocks than it has rows or columns, channels are dead, and
`convert` removes them; with `--masks covered` each row and column keeps a block, whatever the sparsity. With
`--pointwise` the 1x1 convs alone have blocks. An arm that the file of `--json` holds already, of the same commit and
processor, is not measured again. Beside the ratio stand the MACs that the arm runs, as a fraction of the dense ones,
and its rate as a fraction of the machine's peak, which is measured before and after each pair of arms.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn

import fxdbsr
from bench.peak import peak_gflops
from fxdbsr.commands.bench import converted, frozen
from fxdbsr.commands.source import parse_block
from fxdbsr.nn.packed import PackedConv
from fxdbsr.paired import as_row, paired, provenance, write_lines

Build = Callable[[], tuple[Callable[[], Any], nn.Module]]
COLUMNS = (
    "model",
    "masks",
    "batch",
    "dtype",
    "block",
    "arm",
    "macs",
    "peak",
    "median",
    "low",
    "high",
    "base_ms",
    "arm_ms",
    "pairs",
)


def onnxruntime_call(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A call of the dense model by ONNX Runtime on as many threads as torch has."""
    import onnxruntime

    file = io.BytesIO()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    file.write(program.model_proto.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # else it slows down what runs next
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    name, array = session.get_inputs()[0].name, x.contiguous().numpy()
    return lambda: session.run(None, {name: array})


def arms_of(dense: nn.Module, x: Tensor, options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Build]]:
    """What each arm is, and what makes its call and its model."""
    yield {"arm": "eager", "block": "-"}, lambda: (partial(dense, x), dense)
    if x.dtype == torch.float32 and find_spec("onnxruntime"):
        yield {"arm": "onnxruntime", "block": "-"}, lambda: (onnxruntime_call(dense, x), dense)
    for block in options.block.split(","):
        for sparsity in map(float, options.sparsity.split(",")):
            yield {"arm": f"{sparsity:.0%}", "block": block}, partial(sparse, dense, x, block, sparsity, options)


def sparse(
    dense: nn.Module, x: Tensor, block: str, sparsity: float, options: argparse.Namespace
) -> tuple[Callable[[], Any], nn.Module]:
    """The call and the model of an arm of ours."""
    masks = {"cover": options.masks == "covered", "pointwise": options.pointwise}
    fast = converted(dense, x, parse_block(block), sparsity, "auto", False, **masks)
    return partial(fast, x), fast


def engines(model: nn.Module) -> dict[str, int]:
    """How many packed convs of `model` each engine runs."""
    return dict(Counter(module.engine for module in model.modules() if isinstance(module, PackedConv)))


def measured(
    name: str, batch: int, options: argparse.Namespace, done: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """A row for each arm of the model `name` at that batch which is not `done`."""
    torch.manual_seed(0)
    dtype, shape = getattr(torch, options.dtype), (batch, 3, options.size, options.size)
    dense = torchvision.models.get_model(name, weights=None).eval().to(dtype).to(memory_format=torch.channels_last)
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    masks = options.masks + (", 1x1 convs" if options.pointwise else "")
    setting = {"model": name, "masks": masks, "batch": batch, "dtype": options.dtype}
    arms = [(setting | key, build) for key, build in arms_of(dense, x, options)]
    arms = [(key, build) for key, build in arms if not any(key.items() <= row.items() for row in done)]
    if not arms:
        return
    base = frozen(dense, x)
    macs_dense = fxdbsr.report(dense, x).total.macs_run  # of `dense`: layers that are gone are in no row of `model`
    for key, build in arms:
        call, model = build()
        total = fxdbsr.report(model, x).total
        with torch.inference_mode():
            peaks = [peak_gflops()]  # of float32; bfloat16 on tile registers has another
            ratio = paired(base, call, max(6, options.pairs // (1 + batch // 8)), warm_up=3)
            peaks.append(peak_gflops())
        rate = 2e-6 * total.macs_run / ratio.arm_ms / max(peaks)
        row = key | {"macs": round(total.macs_run / macs_dense, 4), "peak": round(rate, 4)}
        row |= as_row(ratio) | {"engines": engines(model), "peak_gflops": [round(peak, 1) for peak in peaks]}
        yield row
        del call, model
        gc.collect()


def rows_before(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that this code has written on this machine, to go on from there."""
    if not path.exists():
        return []
    machine, *rows = map(json.loads, path.read_text().splitlines())
    now = provenance()
    return rows if all(machine[name] == now[name] for name in ("commit", "processor", "threads", "torch")) else []


def main() -> None:
    """Run what the command line asks for, print the table, write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="resnet50")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--sparsity", default="0,0.5,0.7,0.9")
    parser.add_argument("--block", default="32x32")
    parser.add_argument("--masks", default="exact", choices=["exact", "covered"])
    parser.add_argument("--pointwise", action="store_true", help="blocks in the 1x1 convs alone")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=20, help="for one image; fewer for batches, at least 6")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--json", type=Path, help="file that is written after each arm, and gone on with")
    options = parser.parse_args()
    rows = rows_before(options.json) if options.json else []
    for name in options.models.split(","):
        for batch in map(int, options.batch.split(",")):
            for row in measured(name, batch, options, [*rows]):
                rows.append(row)
                print(row, flush=True)
                if options.json:
                    write_lines(options.json, rows)
    print(f"{provenance()}\n{tabulate([[row[c] for c in COLUMNS] for row in rows], headers=COLUMNS, floatfmt='.3g')}")


if __name__ == "__main__":
    main()
