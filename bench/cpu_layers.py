"""The convs of a network, one by one: the CPU engine against oneDNN with weights reordered beforehand.

    python -m bench.cpu_layers --model vgg11_bn --sparsity 0,0.5,0.7,0.9 --block 32x32 --json FILE

Every distinct conv of the network meets the input shape that it has there, with bias and ReLU on both sides. Dense is
the operator that a frozen inductor model calls; sparse is the converted conv alone, called as a model is. Both read and
write tensors with channels last, which costs the engine a copy that it is spared inside a network. Interleaved pairs
(dense, sparse, sparse, dense); errors are the largest difference from float64 over the largest output. The last rows
hold the sums over the network: medians of each conv, times its calls. The first conv stays dense, as in a network.
"""

from __future__ import annotations

import argparse
import copy
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
from fxdbsr.commands.bench import IMAGE_CHANNELS, converted
from fxdbsr.commands.source import parse_block
from fxdbsr.nn.packed import PackedConv
from fxdbsr.paired import as_row, paired, write_lines

COLUMNS = ("conv", "calls", "sparsity", "median", "low", "high", "base_ms", "arm_ms", "error", "error_dense", "engine")


def convs_of(model: nn.Module, x: Tensor) -> Counter[tuple[Any, ...]]:
    """(channels, outputs, kernel, stride, padding, dilation, groups, input size) of every conv, with its calls."""
    found: Counter[tuple[Any, ...]] = Counter()

    def note(conv: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(conv, nn.Conv2d)
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        found[(conv.in_channels, conv.out_channels, *geometry, tuple(args[0].shape[2:]))] += 1

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    with torch.inference_mode():
        model(x)
    return found


def dense_call(conv: nn.Conv2d, x: Tensor) -> Callable[[], Tensor]:
    """The call of a frozen inductor model: oneDNN with the weight in its order, bias and ReLU in the same kernel."""
    sizes: list[Any] = [list(conv.padding), list(conv.stride), list(conv.dilation)]
    weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *sizes, conv.groups, list(x.shape))
    run = torch.ops.mkldnn._convolution_pointwise
    return lambda: run(x, packed, conv.bias, *sizes, conv.groups, "relu", [], "")


def error(found: Tensor, conv: nn.Conv2d, x: Tensor) -> float:
    """Largest difference from float64, over the largest output."""
    exact = torch.relu(copy.deepcopy(conv).double()(x.double()))
    return float((found.double() - exact).abs().max() / exact.abs().max())


def measured(conv: nn.Conv2d, x: Tensor, block: str, sparsity: float, pairs: int) -> dict[str, Any]:
    """One conv at one sparsity; both sides are checked on the weights that they have."""
    net = nn.Sequential(conv, nn.ReLU())
    if conv.in_channels <= IMAGE_CHANNELS:
        fast: nn.Module = fxdbsr.convert(net, block_size=parse_block(block))
    else:
        fast = converted(net, x, parse_block(block), sparsity, "auto", False)
    layer = next(module for module in fast.modules() if isinstance(module, PackedConv))
    kept = copy.deepcopy(conv)
    with torch.inference_mode():
        kept.weight.copy_(layer.weight())
        errors = error(fast(x), kept, x), error(dense_call(kept, x)(), kept, x)
        ratio = paired(dense_call(conv, x), partial(fast, x), pairs, warm_up=3)
    return as_row(ratio) | {"error": errors[0], "error_dense": errors[1], "engine": layer.engine}


def rows_of(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each conv and sparsity, then one for the sum of each sparsity."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model = torchvision.models.get_model(name, weights=None).eval()
    sums: dict[float, list[float]] = {}
    for (c, o, kernel, stride, padding, dilation, groups, size), calls in convs_of(
        model, torch.randn(1, 3, options.size, options.size)
    ).items():
        conv = nn.Conv2d(c, o, kernel, stride, padding, dilation, groups).to(dtype)
        conv = conv.to(memory_format=torch.channels_last).requires_grad_(False)
        x = torch.randn(options.batch, c, *size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        text = f"{c}-{o} {kernel[0]}x{kernel[1]}/{stride[0]} g{groups} @{size[0]}"
        for sparsity in map(float, options.sparsity.split(",")):
            row = measured(conv, x, options.block, sparsity, options.pairs)
            total = sums.setdefault(sparsity, [0.0, 0.0])
            total[0] += calls * row["base_ms"]
            total[1] += calls * row["arm_ms"]
            yield {"conv": text, "calls": calls, "sparsity": sparsity} | row
    for sparsity, (base, arm) in sums.items():
        ratio = {"median": round(base / arm, 4), "base_ms": round(base, 4), "arm_ms": round(arm, 4)}
        yield {"conv": "sum", "sparsity": sparsity} | ratio


def main() -> None:
    """Measure, write the file, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--sparsity", default="0,0.5,0.7,0.9")
    parser.add_argument("--block", default="32x32")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--json", type=Path, help="file that is written at the end")
    options = parser.parse_args()
    setting = {"model": options.model, "block": options.block, "dtype": options.dtype, "batch": options.batch}
    rows = [setting | row for row in rows_of(options.model, options)]
    if options.json:
        write_lines(options.json, rows)
    print(tabulate([[row.get(c, "") for c in COLUMNS] for row in rows], headers=COLUMNS, floatfmt=".3g"))


if __name__ == "__main__":
    main()
