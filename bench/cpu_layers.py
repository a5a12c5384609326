"""Layers of ResNet-50 on the CPU engine against prepacked oneDNN, the best dense conv that torch has.

    python bench/cpu_layers.py layers.jsonl --density 0.5 0.1 --block 32 32 --dtype float32

Every round runs dense, then each density, each once after an untimed call of its own, so that all sides meet
the same noise; the ratio is the median over rounds of dense time / sparse time, with quartiles. Outputs are
checked before they are timed. `--cpu-time` counts the CPU time of the calling thread instead, for a busy
machine; it needs `--threads 1`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels import cpu, jit
from fxdbsr.kernels.geometry import output_size

# (name, C, O, kernel, stride, input size, times in the network)
RESNET50 = (
    ("stem 7x7 3-64 @224", 3, 64, 7, 2, 224, 1),
    ("layer1 1x1 64-64 @56", 64, 64, 1, 1, 56, 1),
    ("layer1 1x1 256-64 @56", 256, 64, 1, 1, 56, 2),
    ("layer1 3x3 64-64 @56", 64, 64, 3, 1, 56, 3),
    ("layer1 1x1 64-256 @56", 64, 256, 1, 1, 56, 4),
    ("layer2 1x1 256-128 @56", 256, 128, 1, 1, 56, 1),
    ("layer2 3x3/2 128-128 @56", 128, 128, 3, 2, 56, 1),
    ("layer2 1x1 512-128 @28", 512, 128, 1, 1, 28, 3),
    ("layer2 3x3 128-128 @28", 128, 128, 3, 1, 28, 3),
    ("layer2 1x1 128-512 @28", 128, 512, 1, 1, 28, 4),
    ("layer2 1x1/2 256-512 @56", 256, 512, 1, 2, 56, 1),
    ("layer3 1x1 512-256 @28", 512, 256, 1, 1, 28, 1),
    ("layer3 3x3/2 256-256 @28", 256, 256, 3, 2, 28, 1),
    ("layer3 1x1 1024-256 @14", 1024, 256, 1, 1, 14, 5),
    ("layer3 3x3 256-256 @14", 256, 256, 3, 1, 14, 5),
    ("layer3 1x1 256-1024 @14", 256, 1024, 1, 1, 14, 6),
    ("layer3 1x1/2 512-1024 @28", 512, 1024, 1, 2, 28, 1),
    ("layer4 1x1 1024-512 @14", 1024, 512, 1, 1, 14, 1),
    ("layer4 3x3/2 512-512 @14", 512, 512, 3, 2, 14, 1),
    ("layer4 1x1 2048-512 @7", 2048, 512, 1, 1, 7, 2),
    ("layer4 3x3 512-512 @7", 512, 512, 3, 1, 7, 2),
    ("layer4 1x1 512-2048 @7", 512, 2048, 1, 1, 7, 3),
    ("layer4 1x1/2 1024-2048 @14", 1024, 2048, 1, 2, 14, 1),
)


def dense_conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Callable[[], Tensor]:
    """The conv that a frozen inductor model calls: oneDNN with its weight reordered beforehand."""
    sizes: list[list[int]] = [[padding] * 2, [stride] * 2, [1, 1]]
    weight = weight.contiguous(memory_format=torch.channels_last)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *sizes, 1, list(x.shape))
    run = torch.ops.mkldnn._convolution_pointwise
    return lambda: run(x, packed, bias, *sizes, 1, "none", [], "")


def sparse_conv(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, block: tuple[int, int], density: float
) -> tuple[Callable[[], Tensor], Tensor]:
    """The engine over that share of the blocks, rounded to whole ones, and the weight it stands for."""
    grid = BlockGrid.of(tuple(weight.shape), block)
    rows, columns = grid.shape
    keep = torch.zeros(rows * columns, dtype=torch.bool)
    keep[torch.randperm(rows * columns)[: max(1, round(rows * columns * density))]] = True
    values, crow, col = grid.pack(weight, keep.view(rows, columns))
    packed = cpu.layout(values)
    sizes = ((stride, stride), (padding, padding), (1, 1))
    tail: tuple[Any, ...] = ([], weight.shape[1], weight.shape[0], *sizes, 1, "none", 0.0)
    return lambda: cpu.conv(x, packed, crow, col, bias, None, *tail), grid.unpack(values, crow, col)


def interleaved(runs: list[Callable[[], Tensor]], seconds: float, cpu_time: bool) -> list[list[float]]:
    """Times in ms of each of `runs`, taken in turn for `seconds`, at least ten rounds."""
    clock = time.thread_time if cpu_time else time.perf_counter
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 10:
        for run, own in zip(runs, times, strict=True):
            run()
            start = clock()
            run()
            own.append(1e3 * (clock() - start))
    return times


def commit() -> str:
    """The commit that is measured, "unknown" outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def main() -> None:
    """Measure, print a table, append JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="file that the JSON lines are appended to")
    parser.add_argument("--density", type=float, nargs="+", default=[1.0, 0.5, 0.3, 0.1])
    parser.add_argument("--block", type=int, nargs=2, default=[32, 32])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.3, help="for each layer and density")
    parser.add_argument("--only", default="", help="layers whose name holds this")
    parser.add_argument("--cpu-time", action="store_true")
    given = parser.parse_args()
    if given.cpu_time and given.threads != 1:
        parser.error("--cpu-time needs --threads 1")
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, given.dtype)
    target = jit.host()
    assert target is not None, "the engine does not know this CPU"
    setting: dict[str, Any] = {
        "commit": commit(),
        "machine": f"{platform.processor() or platform.machine()} {target.cpu}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": given.threads,
        "dtype": given.dtype,
        "block": given.block,
        "batch": given.batch,
        "clock": "cpu" if given.cpu_time else "wall",
    }
    totals = [0.0] * (1 + len(given.density))
    print(f"{'layer':28} dense ms GFLOP/s " + "".join(f"| {d:4.0%}: ms, ratio [quartiles] " for d in given.density))
    for name, C, out, k, stride, size, count in RESNET50:
        if given.only not in name:
            continue
        x = torch.randn(given.batch, C, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
        weight, bias = (
            (torch.randn(out, C, k, k) / (C * k * k) ** 0.5).to(dtype),
            torch.zeros(out, dtype=dtype),
        )
        runs, errors = [dense_conv(x, weight, bias, stride, k // 2)], [0.0]
        with torch.inference_mode():
            for density in given.density:
                block = (given.block[0], given.block[1])
                run, kept = sparse_conv(x, weight, bias, stride, k // 2, block, density)
                exact = torch.nn.functional.conv2d(x.float(), kept.float(), bias.float(), stride, k // 2)
                errors.append(float((run().float() - exact).abs().max() / exact.abs().max()))
                assert errors[-1] < (1e-5 if dtype == torch.float32 else 1e-2), f"{name}: error {errors[-1]}"
                runs.append(run)
            times = interleaved(runs, given.seconds * len(runs), given.cpu_time)
        p, q = output_size((size, size), (k, k), (stride, stride), (k // 2, k // 2), (1, 1))
        flops = 2e-6 * given.batch * p * q * C * out * k * k
        cells = []
        with given.output.open("a") as file:
            for density, own, error in zip([None, *given.density], times, errors, strict=True):
                ratios = [a / b for a, b in zip(times[0], own, strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                row = {
                    "layer": name,
                    "times_in_network": count,
                    "density": density,
                    "ms": statistics.median(own),
                }
                row |= {"ratio": middle, "quartiles": [low, high], "rounds": len(own), "error": error}
                file.write(json.dumps(setting | row) + "\n")
                cells.append(f"| {row['ms']:7.3f} {middle:5.2f} [{low:5.2f} {high:5.2f}] ")
        medians = [statistics.median(own) for own in times]
        totals = [total + count * ms for total, ms in zip(totals, medians, strict=True)]
        print(f"{name:28} {medians[0]:8.3f} {flops / medians[0]:7.0f} {''.join(cells[1:])}", flush=True)
    print(
        f"{'sum, times in network':28} {totals[0]:8.3f}         "
        + "".join(f"| {t:7.3f} {totals[0] / t:5.2f} " for t in totals[1:])
    )


if __name__ == "__main__":
    main()
