"""What the planner does with every conv of ResNet-50, ResNeXt-50 and VGG-11, and the roofline's ceiling beside it.

    python -m bench.gpu_plan --json bench/results/gpu_plan.jsonl

Estimates of a model of an NVIDIA H200 (`kernels/triton_roofline.py`) for random choices of blocks; no GPU is
touched, and the file says `measured: false`. `ceiling` is how many times faster than the dense conv a sparse kernel
could be that met the roofline.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from bench.gpu_convs import convs, estimate
from bench.gpu_setting import BLOCKS, DTYPES, machine, set_precision

MODELS = ("resnet50", "resnext50_32x4d", "vgg11")


def rows(
    models: Sequence[str], dtypes: Sequence[str], batches: Sequence[int], blocks: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """One row a conv and setting, with what is said at 50, 70 and 90 % of the blocks off."""
    for model, dtype, batch, block in product(models, dtypes, batches, blocks):
        set_precision(dtype)
        for conv, count in convs(model).items():
            row = {"model": model, "dtype": dtype, "batch": batch, "block": block, "layer": conv.name, "count": count}
            for sparsity in (50, 70, 90):
                layer = conv.layer(batch, DTYPES[dtype], BLOCKS[block], 1 - sparsity / 100)
                row[f"{sparsity} %"] = estimate(layer)
            yield row


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the rows, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=("fp16", "tf32", "fp32"))
    parser.add_argument("--batch", nargs="+", type=int, default=(32,))
    parser.add_argument("--block", nargs="+", choices=BLOCKS, default=("32x32", "128x32"))
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args(arguments)
    found = []
    for row in rows(options.model, options.dtype, options.batch, options.block):
        found.append(row)
        print(f"{row['model']} {row['dtype']} b{row['batch']} {row['block']} {row['layer']} x{row['count']}")
        for sparsity in (50, 70, 90):
            said = row[f"{sparsity} %"]
            print(f"    {sparsity} %  ceiling {said['ceiling']:5.2f}x  {said['choice']:6}  {said['reason']}")
    if options.json:
        head = {"measured": False, "model of": "NVIDIA H200, data sheet", **machine()}
        options.json.write_text("".join(json.dumps(line) + "\n" for line in (head, *found)))


if __name__ == "__main__":
    main()
