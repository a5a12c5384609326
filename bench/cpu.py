"""Converted models on a CPU, end to end: against inductor-frozen dense, eager dense and ONNX Runtime.

    python -m bench.cpu --models resnet50 --batch 1,8 --sparsity 0,0.5,0.7,0.9 --block 32x32 --json FILE

The base is `torch.compile` with freezing (inductor: batch norms folded, weights prepacked for oneDNN, pointwise
operators fused), channels last. Every other arm is timed against it in interleaved pairs (base, arm, arm, base); the
ratio is the median over pairs, with quartiles, above 1 where the arm is faster. All arms of a batch size live in one
process. The same fraction of the blocks of every conv is off, spread evenly over rows and columns; the stem and the
classifier keep dense weights. Where a layer keeps fewer blocks than it has rows or columns, channels are dead, and
`convert` removes them; with `--masks covered` each row and column keeps a block, whatever the sparsity. Beside the
ratio stand the MACs that the arm runs, as a fraction of the dense ones, and its rate as a fraction of the machine's
peak, which is measured before and after each pair of arms.
"""

from __future__ import annotations

import argparse
import gc
import io
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
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

ARMS = ("eager", "onnxruntime")
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


def onnxruntime_call(model: nn.Module, x: Tensor) -> Callable[[], Any] | None:
    """A call of the dense model by ONNX Runtime on as many threads as torch has; None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
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


def arms_of(
    dense: nn.Module, x: Tensor, blocks: list[str], sparsities: list[float], cover: bool
) -> Iterator[tuple[dict[str, Any], Callable[[], Any], nn.Module]]:
    """(what it is, a call, the model) of each arm."""
    yield {"arm": "eager", "block": "-"}, partial(dense, x), dense
    if x.dtype == torch.float32:
        session = onnxruntime_call(dense, x)
        if session is not None:
            yield {"arm": "onnxruntime", "block": "-"}, session, dense
    for block in blocks:
        for sparsity in sparsities:
            fast = converted(dense, x, parse_block(block), sparsity, "auto", False, cover)
            yield {"arm": f"{sparsity:.0%}", "block": block}, partial(fast, x), fast


def engines(model: nn.Module) -> dict[str, int]:
    """How many packed convs of `model` each engine runs."""
    return dict(Counter(module.engine for module in model.modules() if isinstance(module, PackedConv)))


def measured(
    name: str, batch: int, size: int, dtype: torch.dtype, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for each arm of the model `name` at that batch."""
    torch.manual_seed(0)
    dense = torchvision.models.get_model(name, weights=None).eval().to(dtype).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    base = frozen(dense, x)
    sparsities = [float(s) for s in options.sparsity.split(",")]
    for key, call, model in arms_of(dense, x, options.block.split(","), sparsities, options.masks == "covered"):
        total = fxdbsr.report(model, x).total
        with torch.inference_mode():
            peaks = [peak_gflops()]  # of float32; bfloat16 on tile registers has another
            ratio = paired(base, call, max(6, options.pairs // (1 + batch // 8)), warm_up=3)
            peaks.append(peak_gflops())
        rate = 2e-6 * total.macs_run / ratio.arm_ms / max(peaks)
        row = {"model": name, "masks": options.masks, "batch": batch, "dtype": str(dtype).removeprefix("torch.")} | key
        row |= {"macs": round(total.macs_run / total.macs_dense, 4), "peak": round(rate, 4)}
        row |= as_row(ratio) | {"engines": engines(model), "peak_gflops": [round(peak, 1) for peak in peaks]}
        yield row
        del call, model
        gc.collect()


def main() -> None:
    """Run what the command line asks for, print the table, write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="resnet50")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--sparsity", default="0,0.5,0.7,0.9")
    parser.add_argument("--block", default="32x32")
    parser.add_argument("--masks", default="exact", choices=["exact", "covered"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=20, help="for one image; fewer for batches, at least 6")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--json", type=Path, help="file that is written after each arm")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.models.split(","):
        for batch in map(int, options.batch.split(",")):
            for row in measured(name, batch, options.size, getattr(torch, options.dtype), options):
                rows.append(row)
                print(row, flush=True)
                if options.json:
                    write_lines(options.json, rows)
    print(f"{provenance()}\n{tabulate([[row[c] for c in COLUMNS] for row in rows], headers=COLUMNS, floatfmt='.3g')}")


if __name__ == "__main__":
    main()
