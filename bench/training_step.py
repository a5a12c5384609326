"""What block scales cost in training: one step of ResNet-50, prepared against dense, on this CPU.

A step is forward, loss, backward and SGD with momentum. Three arms, interleaved:

* dense: the plain model;
* prepared: fxdbsr's block scales, a broadcast over a view of the weight;
* expanded: the scale expanded to the weight's full shape by repeat_interleave in every forward, as the
  method's authors do.

Ratios are medians over the repeats of time / time of dense in the same repeat.

    python -m bench.training_step [--batch 16] [--size 224] [--repeats 7] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from tabulate import tabulate
from torch import Tensor, nn

import fxdbsr
from fxdbsr.nn.scaled import ScaledConv2d


class ExpandedConv2d(ScaledConv2d):
    """A scaled conv whose scale is materialised at every weight."""

    def scaled_weight(self) -> Tensor:
        bo, bc = self.grid.block_size
        expanded = (self.scale * self.mask).repeat_interleave(bo, 0).repeat_interleave(bc, 1)
        expanded = expanded[: self.weight.shape[0], : self.weight.shape[1], None, None]
        scaled: Tensor = self.weight * expanded.repeat(1, 1, *self.weight.shape[2:])
        return scaled


def arms(block_size: int) -> dict[str, nn.Module]:
    """The three models with equal weights, channels_last, in training mode."""
    torch.manual_seed(0)
    dense = torchvision.models.resnet50(weights=None).to(memory_format=torch.channels_last).train()
    prepared, expanded = (fxdbsr.prepare(dense, block_size) for _ in range(2))
    for module in expanded.modules():
        if isinstance(module, ScaledConv2d):
            module.__class__ = ExpandedConv2d
    return {"dense": dense, "prepared": prepared, "expanded": expanded}


def stepper(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], float]:
    """A function that takes one training step and returns its seconds."""
    groups = fxdbsr.param_groups(model, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(images), labels))
        optimizer.step()
        return time.perf_counter() - start

    return step


def measure(batch: int, size: int, repeats: int, block_size: int) -> list[dict[str, Any]]:
    """Seconds and ratios of every arm; one untimed step of each comes first."""
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.arange(batch) % 1000
    steps = {name: stepper(model, images, labels) for name, model in arms(block_size).items()}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats):
        order = list(steps) if repeat % 2 == 0 else list(reversed(steps))
        for name in order:
            seconds[name].append(steps[name]())
    rows = []
    for name, values in seconds.items():
        ratios = sorted(v / d for v, d in zip(values, seconds["dense"], strict=True))
        rows.append(
            {
                "arm": name,
                "ms": 1e3 * statistics.median(values),
                "ratio": statistics.median(ratios),
                "ratio_min": ratios[0],
                "ratio_max": ratios[-1],
            }
        )
    return rows


def machine() -> dict[str, Any]:
    """Versions, processor, threads and commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    try:
        with open("/proc/cpuinfo") as info:
            cpu = next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    return {
        "fxdbsr": fxdbsr.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="time a training step with and without block scales")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--json", metavar="PATH", help="append JSON lines to this file")
    args = parser.parse_args()
    rows = measure(args.batch, args.size, args.repeats, args.block)
    shape = f"batch {args.batch}, {args.size}x{args.size}, blocks {args.block}x{args.block}"
    print(f"ResNet-50, {shape}, float32, channels_last, {torch.get_num_threads()} threads")
    print(tabulate(rows, headers="keys", floatfmt=("", ".1f", ".3f", ".3f", ".3f")))
    if args.json:
        shared = {"model": "resnet50", "batch": args.batch, "size": args.size, "block": args.block}
        with open(args.json, "a") as file:
            for row in rows:
                file.write(json.dumps(row | shared | {"repeats": args.repeats} | machine()) + "\n")


if __name__ == "__main__":
    main()
