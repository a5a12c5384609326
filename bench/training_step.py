"""What block scales cost in training: one step of ResNet-50, prepared against dense, on this CPU.

A step is forward, loss, backward and SGD with momentum. Three arms, interleaved:

* dense: the plain model;
* prepared: fxdbsr's block scales, a broadcast over a view of the weight;
* expanded: the scale expanded to the weight's full shape by repeat_interleave in every forward, as the
  method's authors do.

Ratios are the arm's time over dense's: medians of interleaved pairs, dense, arm, arm, dense.

    python -m bench.training_step [--batch 16] [--size 224] [--pairs 8] [--json PATH]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from tabulate import tabulate
from torch import Tensor, nn

import fxdbsr
from fxdbsr.nn.scaled import ScaledConv2d
from fxdbsr.paired import paired, write_lines


class ExpandedConv2d(ScaledConv2d):
    """A scaled conv whose scale is materialised at every weight."""

    def scaled_weight(self, for_conv: bool = False) -> Tensor:
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


def stepper(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A function that takes one training step."""
    groups = fxdbsr.param_groups(model, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(images), labels))
        optimizer.step()

    return step


def measure(batch: int, size: int, pairs: int, block_size: int, chosen: list[str]) -> list[dict[str, Any]]:
    """Every arm against dense; `ratio` is the arm's time over dense's, median and quartiles of the pairs."""
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.arange(batch) % 1000
    steps = {name: stepper(model, images, labels) for name, model in arms(block_size).items()}
    rows = []
    for name in chosen:
        found = paired(steps["dense"], steps[name], pairs)
        ratios = {"ratio": 1 / found.median, "low": 1 / found.high, "high": 1 / found.low}
        rows.append({"arm": name} | ratios | {"dense_ms": found.base_ms, "ms": found.arm_ms, "pairs": pairs})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="time a training step with and without block scales")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--arms", default="prepared,expanded", help="to measure against dense")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write JSON lines to this file")
    args = parser.parse_args()
    rows = measure(args.batch, args.size, args.pairs, args.block, args.arms.split(","))
    shape = f"batch {args.batch}, {args.size}x{args.size}, blocks {args.block}x{args.block}"
    print(f"ResNet-50, {shape}, float32, channels_last, {torch.get_num_threads()} threads")
    print(tabulate(rows, headers="keys", floatfmt=("", ".3f", ".3f", ".3f", ".1f", ".1f")))
    if args.json:
        shared = {"model": "resnet50", "batch": args.batch, "size": args.size, "block": args.block}
        write_lines(args.json, [shared | row for row in rows])


if __name__ == "__main__":
    main()
