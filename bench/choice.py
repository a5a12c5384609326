"""How well the cost model of the CPU chooses: its candidates timed on convs of many shapes, blocks and densities.

    OMP_NUM_THREADS=1 python -m bench.choice [--json bench/results/choice.jsonl]

For each conv: microseconds of CPU time of a call on each candidate, the medians of runs in turns on one thread, and
what `fxdbsr.kernels.cpu_cost` expects. "lost" is the time of the candidate that the rule takes over that of the
fastest, less one. The constants of the model were set by this table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import fxdbsr
from fxdbsr.kernels import cpu_cost
from fxdbsr.kernels.choice import candidates
from fxdbsr.layers import blocked_layers
from fxdbsr.nn.fastest import arm
from fxdbsr.nn.packed import PackedConv
from fxdbsr.paired import processor

CONVS = (  # inputs, outputs, kernel, stride, side
    *((64, 64, 3, 1, 56), (256, 64, 1, 1, 56), (128, 128, 3, 1, 28), (512, 128, 1, 1, 28), (128, 512, 1, 1, 28)),
    *((256, 256, 3, 2, 28), (256, 256, 3, 1, 14), (1024, 256, 1, 1, 14), (512, 512, 3, 1, 7), (512, 2048, 1, 1, 7)),
    *((16, 16, 3, 1, 32), (32, 32, 3, 1, 16), (64, 64, 3, 1, 8)),
)
BLOCKS: tuple[Any, ...] = (32, 16, 8, 4, (1, None), (None, 1))
DENSITIES = (1.0, 0.5, 0.1)
ROUNDS = 5


def packed(conv: tuple[int, ...], block: Any, density: float) -> tuple[PackedConv, torch.Tensor]:
    """A conv with that share of its blocks, and an input; blocks over a whole axis are rows or columns."""
    c, o, kernel, stride, side = conv
    model = nn.Sequential(nn.Conv2d(c, o, kernel, stride, kernel // 2), nn.Sigmoid())
    prepared = fxdbsr.prepare(model, block).eval()
    layer = blocked_layers(prepared)[0]
    kept = torch.zeros(layer.mask.numel(), dtype=torch.bool)
    kept[torch.randperm(len(kept))[: max(1, round(density * len(kept)))]] = True
    layer.set_mask(kept.view_as(layer.mask))
    x = torch.randn(1, c, side, side).contiguous(memory_format=torch.channels_last)  # as layers before give it
    converted = fxdbsr.convert(prepared, example_inputs=x)
    return next(m for m in converted.modules() if isinstance(m, PackedConv)), x


def microseconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median CPU time of each call, in turns, each after one that is not timed."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()
            start = time.thread_time_ns()
            for _ in range(3):
                call()
            found[name].append((time.thread_time_ns() - start) / 3e3)
    return {name: median(times) for name, times in found.items()}


@torch.inference_mode()
def measure(conv: tuple[int, ...], block: Any, density: float) -> dict[str, Any]:
    """One row of the table."""
    layer, x = packed(conv, block, density)
    case = layer.case()
    arms = {name: arm(layer, choice.engine, choice.form) for name, choice in candidates(case).items()}
    times = microseconds({name: lambda made=made: made(x) for name, made in arms.items()})  # type: ignore[misc]
    row = {"conv": "{}-{} {}x{}/{} @{}".format(*conv[:3], conv[2], *conv[3:]), "block": str(block), "density": density}
    row |= {f"{name} us": round(times[name], 1) for name in ("cpu", "dense", "compact") if name in times}
    row |= {f"{name} expected": round(cpu_cost.microseconds(name, case), 1) for name in times}
    return row | {"taken": layer.engine, "lost": times[layer.engine] / min(times.values()) - 1}


def main() -> None:
    """Run, print the table, write JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = [measure(conv, block, density) for conv in CONVS for block in BLOCKS for density in DENSITIES]
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    lost = geometric_mean([1 + row["lost"] for row in rows]) - 1
    print(
        f"{sum(row['lost'] == 0 for row in rows)} of {len(rows)} on the fastest candidate, {lost:.1%} lost on average"
    )
    if arguments.json:
        about = {"torch": torch.__version__, "processor": processor()}
        arguments.json.write_text("".join(json.dumps(about | row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
