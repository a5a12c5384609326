"""Columns that neighbouring rows of blocks read together, before and after `cluster_rows`, for random masks.

    python -m bench.row_order [--json bench/results/row_order.json]

"random": rows of so many columns, half of the blocks kept, in the order that `clustered` finds. Models: each conv's
blocks half off at random; the share is the mean over all convs with at least two rows and two columns, weighted by
the rows; layers whose channels are tied to others' (residual streams) get one order for all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from tabulate import tabulate
from torch import fx, nn

import fxdbsr
from bench.coverage import build
from fxdbsr.channels.rows import clustered, union_share
from fxdbsr.layers import blocked_layers
from fxdbsr.nn.scaled import ScaledLayer
from fxdbsr.passes import CONVERT, run
from fxdbsr.passes.cluster_rows import cluster_rows
from fxdbsr.passes.lowering import Lowering
from fxdbsr.traced import TwoGraphModule

SHAPES = ((8, 8), (16, 16), (32, 32), (64, 64), (8, 32), (32, 8), (64, 16), (16, 64))
SIZES = (2, 4)


def random_rows(rows: int, columns: int, seeds: int = 10) -> dict[str, Any]:
    """Shares for `rows` random rows of `columns`, means over `seeds` masks."""
    found: dict[str, float] = {}
    for seed in range(seeds):
        random = Random(seed)
        masks = [sum(1 << c for c in random.sample(range(columns), columns // 2)) for _ in range(rows)]
        for when, order in (("before", list(range(rows))), ("after", clustered(masks))):
            for size in SIZES:
                key = f"{size} rows {when}"
                found[key] = found.get(key, 0.0) + union_share(masks, order, size, columns) / seeds
    return {"case": f"random {rows} x {columns}"} | found


def masks_of(layer: ScaledLayer) -> list[int]:
    """The rows of blocks of `layer` that hold one, as bit masks of columns."""
    kept = layer.grid.nonzero(layer.weight)
    return [sum(1 << c for c, flag in enumerate(row) if flag) for row in kept.tolist()]


def shares(model: fx.GraphModule, when: str) -> dict[str, float]:
    """Mean share over the convs of `model`, weighted by their rows."""
    layers = [m for m in model.modules() if isinstance(m, ScaledLayer) and min(m.grid.shape) > 1 and m.grid.groups == 1]
    weights = [layer.grid.shape[0] for layer in layers]
    found = {}
    for size in SIZES:
        each = [union_share(rows, range(len(rows)), size, m.grid.shape[1]) for m in layers for rows in [masks_of(m)]]
        found[f"{size} rows {when}"] = sum(s * w for s, w in zip(each, weights, strict=True)) / sum(weights)
    return found


def model_rows(name: str, block: int) -> dict[str, Any]:
    """Shares over the convs of the torchvision model `name`."""
    prepared = fxdbsr.prepare(build(name), block).eval()
    generator = torch.Generator().manual_seed(0)
    for layer in blocked_layers(prepared):
        mask = torch.rand(layer.mask.shape, generator=generator) < 0.5
        mask[0, 0] = True  # a net without a path is no example
        layer.set_mask(mask)
    model: nn.Module = prepared.graph_module(False) if isinstance(prepared, TwoGraphModule) else prepared
    assert isinstance(model, fx.GraphModule)
    before = CONVERT[: CONVERT.index(cluster_rows)]
    run(before, model, Lowering("reference"))
    found = {"case": f"{name}, blocks of {block}"} | shares(model, "before")
    run([cluster_rows], model, Lowering("reference"))
    return found | shares(model, "after")


def main() -> None:
    """Run, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="resnet50,vgg11_bn,densenet121")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [random_rows(*shape) for shape in SHAPES]
    rows += [model_rows(name, block) for name in arguments.models.split(",") if name for block in (32, 16)]
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
