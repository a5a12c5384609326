"""How near a Sparsifier comes to its target, on torchvision's models with fresh weights and blocks of 32x32.

    python -m bench.targets [--models resnet50,mobilenet_v2] [--json bench/results/targets.jsonl]

The miss may be 0.5 points, or half of the share of the dearest block where that is more. A target that cannot be met
has to be refused with the figure that can, and that figure has to be met.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import fxdbsr
from fxdbsr.scales import block_costs

MODELS = (
    "resnet18", "resnet50", "resnext50_32x4d", "vgg11_bn", "mobilenet_v2", "efficientnet_b0", "densenet121",
    "shufflenet_v2_x1_0", "convnext_tiny", "regnet_y_400mf",
)  # fmt: skip
TARGETS = (0.3, 0.5, 0.7, 0.9, 0.97)
COSTS = ("blocks", "params", "macs")
EXAMPLE = torch.zeros(1, 3, 64, 64)


def reached(model: nn.Module, optimizer: torch.optim.Optimizer, of: str, target: float) -> tuple[float, float]:
    """The sparsity that the target leaves, and the largest miss that is allowed; every mask is on afterwards."""
    sparsifier = fxdbsr.Sparsifier(model, optimizer, target=target, of=of, steps=1, example_inputs=EXAMPLE)
    sparsifier.finalize()
    sparsifier.remove()
    found = sparsifier.sparsity()
    costs = torch.cat([c.flatten() for c in block_costs(sparsifier.layers, of, measured=True)])
    for layer in sparsifier.layers:
        layer.set_mask(torch.ones_like(layer.mask))
    return found, max(0.005, float(costs.max() / costs.sum()) / 2)


def measure(name: str) -> list[dict[str, Any]]:
    """A row for every cost and target."""
    torch.manual_seed(0)
    model = fxdbsr.prepare(torchvision.models.get_model(name, weights=None), 32)
    optimizer = torch.optim.SGD(fxdbsr.param_groups(model, 0.0), lr=0.1)
    rows = []
    for of in COSTS:
        for target in TARGETS:
            row: dict[str, Any] = {"model": name, "of": of, "target": target, "refused": False}
            try:
                row["sparsity"], row["allowed_miss"] = reached(model, optimizer, of, target)
            except ValueError as error:
                at_most = float(re.findall(r"at most ([\d.]+\d)", str(error))[0])
                row["refused"], row["most"] = True, at_most
                row["sparsity"], row["allowed_miss"] = reached(model, optimizer, of, at_most)
            row["miss"] = abs(row["sparsity"] - row.get("most", target))
            row["met"] = row["miss"] <= row["allowed_miss"]
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.models.split(","):
        own = measure(name)
        rows += own
        worst = max(own, key=lambda row: row["miss"] / row["allowed_miss"])
        met, refused = sum(row["met"] for row in own), sum(row["refused"] for row in own)
        miss = f"{100 * worst['miss']:.3f} of {100 * worst['allowed_miss']:.3f} points"
        print(f"{name:20} {met} of {len(own)} met, {refused} refused; nearest to its bound {miss}", flush=True)
    if args.json is not None:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
