"""End to end on a CPU: converted models against inductor-frozen dense, eager and the same without zeros.

    python -m bench.cpu --models resnet50 --batch 1,8 --sparsity 0,0.5,0.7,0.9 --block 32x32 --json FILE

The stem and the classifier keep dense weights; a random share of the blocks of every other conv is switched off.
The base is `torch.compile` with freezing (inductor: batch norms folded, weights prepacked for oneDNN, pointwise
operators fused), channels last. Ratios are medians of interleaved pairs; above 1 the converted model is faster.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn

import fxdbsr
from bench.paired import as_row, paired, write_lines
from fxdbsr.layers import blocked_layers
from fxdbsr.nn.packed import PackedConv

STEMS = {"resnet50": "conv1", "resnext50_32x4d": "conv1", "vgg11_bn": "features.0", "mobilenet_v2": "features.0.0"}


def frozen(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A call of the inductor-frozen dense model on `x`."""
    torch._dynamo.reset()
    torch._inductor.config.freezing = True
    compiled = torch.compile(copy.deepcopy(model))
    with torch.no_grad():
        compiled(x)
    return partial(compiled, x)


def pruned(model: nn.Module, block: tuple[int, int], sparsity: float, stem: str | None) -> nn.Module:
    """`model` prepared, its stem left dense, with `sparsity` of each layer's blocks off at random."""
    config = fxdbsr.BlockConfig(block, by_name={stem: None} if stem else {})
    prepared = fxdbsr.prepare(model, config=config)
    generator = torch.Generator().manual_seed(0)
    for layer in blocked_layers(prepared):
        count = layer.mask.numel()
        keep = max(1, round(count * (1 - sparsity)))
        mask = torch.zeros(count, dtype=torch.bool)
        mask[torch.randperm(count, generator=generator)[:keep]] = True
        layer.set_mask(mask.view_as(layer.mask))
    return prepared.eval()


def engines(model: nn.Module) -> dict[str, int]:
    """How many packed convs of `model` each engine runs."""
    return dict(Counter(module.engine for module in model.modules() if isinstance(module, PackedConv)))


def main() -> None:
    """Run what the command line asks for, print the table, write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="resnet50")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--sparsity", default="0.5,0.7,0.9")
    parser.add_argument("--block", default="32x32")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    out, _, in_ = arguments.block.partition("x")
    dtype = getattr(torch, arguments.dtype)
    rows: list[dict[str, Any]] = []
    for name in arguments.models.split(","):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        converted = {}
        for sparsity in map(float, arguments.sparsity.split(",")):
            prepared = pruned(model, (int(out), int(in_ or out)), sparsity, STEMS.get(name))
            converted[sparsity] = fxdbsr.convert(prepared.to(dtype)).to(memory_format=torch.channels_last)
        dense = model.to(dtype).to(memory_format=torch.channels_last)
        for batch in map(int, arguments.batch.split(",")):
            size = (batch, 3, arguments.size, arguments.size)
            x = torch.randn(size, dtype=dtype).contiguous(memory_format=torch.channels_last)
            base = frozen(dense, x)
            arms = {"eager": dense} | {f"{sparsity:.0%}": arm for sparsity, arm in converted.items()}
            for arm, module in arms.items():
                with torch.inference_mode():
                    ratio = paired(base, partial(module, x), arguments.pairs)
                row = {"model": name, "batch": batch, "block": arguments.block, "dtype": arguments.dtype, "arm": arm}
                rows.append(row | {"engines": engines(module)} | as_row(ratio))
                print(rows[-1], flush=True)
    if arguments.json:
        write_lines(arguments.json, rows)
    columns = ["model", "batch", "block", "dtype", "arm", "median", "low", "high", "base_ms", "arm_ms", "pairs"]
    print(tabulate([[row[c] for c in columns] for row in rows], headers=columns, floatfmt=".2f"))


if __name__ == "__main__":
    main()
