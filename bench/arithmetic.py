"""The report's totals for ResNet-50 at the block densities that give the poster's two rows.

    python -m bench.arithmetic [--json bench/results/arithmetic.json]

The poster states parameters and MACs (it says FLOPs) of two networks with 32x32 blocks, but no densities. One
density for the stages 1 to 3 and one for stage 4 were fitted to each row; stem, classifier and norms stay dense.
That the totals agree says that the counter and the poster mean the same arithmetic, and nothing about accuracy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torchvision.models import resnet50

import fxdbsr
from fxdbsr.files import write
from fxdbsr.layers import blocked_layers
from fxdbsr.paired import provenance

BLOCK = (32, 32)
# row of the poster: (density of stages 1 to 3, of stage 4), parameters, MACs
ROWS = {"A": ((0.654, 0.684), 17.89e6, 2.74e9), "B": ((0.541, 0.445), 13.36e6, 2.19e9)}


def first_blocks(shape: tuple[int, int], density: float) -> Tensor:
    """A mask that keeps the first `density` of its blocks; the totals do not depend on which."""
    kept = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
    kept[: round(density * kept.numel())] = True
    return kept.view(shape)


def totals(early: float, late: float, size: int = 224) -> fxdbsr.LayerRow:
    """The report's total of ResNet-50 with these densities in the stages 1 to 3 and in stage 4."""
    model = fxdbsr.prepare(resnet50(), config=fxdbsr.BlockConfig(BLOCK, by_name={"conv1": None}))
    for layer in blocked_layers(model):
        layer.set_mask(first_blocks(layer.grid.shape, late if layer.name.startswith("layer4") else early))
    return fxdbsr.report(model, torch.zeros(1, 3, size, size)).total


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    for row, ((early, late), params, macs) in ROWS.items():
        found = totals(early, late)
        differences = {"params_off": found.params / params - 1, "macs_off": found.macs / macs - 1}
        figures = {"row": row, "density_1_to_3": early, "density_4": late, "params": found.params, "macs": found.macs}
        results.append(figures | {"params_poster": params, "macs_poster": macs} | differences)
    print(tabulate([result.values() for result in results], list(results[0])))
    if args.json:
        write(args.json, json.dumps({"provenance": provenance(), "results": results}, indent=1) + "\n")
    return int(any(abs(result[key]) > 0.01 for result in results for key in ("params_off", "macs_off")))


if __name__ == "__main__":
    raise SystemExit(main())
