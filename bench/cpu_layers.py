"""The convs of a network, one by one: the CPU engine against oneDNN with weights reordered beforehand.

    python -m bench.cpu_layers --model vgg11_bn --sparsity 0,0.5,0.7,0.9 --block 32x32,8x8 --json FILE

Every distinct conv of the network meets the input shape that it has there, with bias and ReLU on both sides. Dense is
the operator that a frozen inductor model calls, on tensors with channels last. "step" is the converted conv as it runs
inside a network, between the layouts that the engine plans; "call" is a model of that conv alone, called from Python,
which copies its input to such a layout first. Where the network takes maxima of 2x2 behind a conv, the engine's step
takes them too, so both arms do that work; the dense side does not. Blocks are off at random. Interleaved pairs (dense,
sparse, sparse, dense); errors are the largest difference from float64 over the largest output. The last rows hold the
sums over the network: medians of each conv, times its calls. The first conv stays dense, as in a network. `peak` is the
rate at which kept weights are multiplied, padding counted, over that of multiplications in registers alone.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, fx, nn

import fxdbsr
from bench.peak import peak_gflops
from fxdbsr.commands.bench import IMAGE_CHANNELS
from fxdbsr.commands.source import parse_block
from fxdbsr.converted import ConvertedModule
from fxdbsr.kernels.cpu_program import Program
from fxdbsr.network.plan import Run
from fxdbsr.network.runner import Runner
from fxdbsr.nn.packed import PackedConv
from fxdbsr.paired import as_row, paired, write_lines

COLUMNS = (
    "block", "conv", "calls", "sparsity", "arm", "peak", "median", "low", "high", "base_ms", "arm_ms", "error",
    "error_dense",
)  # fmt: skip


def convs_of(model: nn.Module, x: Tensor) -> Counter[tuple[Any, ...]]:
    """(channels, outputs, kernel, stride, padding, dilation, groups, input size, pool) of every conv, and its calls."""
    found: Counter[tuple[Any, ...]] = Counter()
    pools = pools_of(model)

    def note(conv: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(conv, nn.Conv2d)
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        found[(conv.in_channels, conv.out_channels, *geometry, tuple(args[0].shape[2:]), pools.get(conv))] += 1

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    with torch.inference_mode():
        model(x)
    return found


def pools_of(model: nn.Module) -> dict[nn.Module, int]:
    """The size of the max pool behind a conv, a batch norm and a ReLU, where its windows lie side by side."""
    traced = fx.symbolic_trace(model)
    modules = dict(traced.named_modules())
    found: dict[nn.Module, int] = {}
    for node in traced.graph.nodes:
        conv, behind = modules.get(str(node.target)), node
        while len(behind.users) == 1 and (
            behind is node or isinstance(modules.get(str(behind.target)), nn.BatchNorm2d | nn.ReLU)
        ):
            behind = next(iter(behind.users))
        pool = modules.get(str(behind.target))
        sizes = (pool.kernel_size, pool.stride, pool.padding) if isinstance(pool, nn.MaxPool2d) else ()
        if isinstance(conv, nn.Conv2d) and sizes == (2, 2, 0):
            found[conv] = 2
    return found


def dense_call(conv: nn.Conv2d, x: Tensor) -> Callable[[], Tensor]:
    """The call of a frozen inductor model: oneDNN with the weight in its order, bias and ReLU in the same kernel."""
    sizes: list[Any] = [list(conv.padding), list(conv.stride), list(conv.dilation)]
    weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *sizes, conv.groups, list(x.shape))
    run = torch.ops.mkldnn._convolution_pointwise
    return lambda: run(x, packed, conv.bias, *sizes, conv.groups, "relu", [], "")


def error(found: Tensor, conv: nn.Conv2d, x: Tensor, pool: int | None = None) -> float:
    """Largest difference from float64, over the largest output."""
    exact = torch.relu(copy.deepcopy(conv).double()(x.double()))
    exact = nn.functional.max_pool2d(exact, pool) if pool else exact
    return float((found.double() - exact).abs().max() / exact.abs().max())


def step_call(fast: ConvertedModule, x: Tensor) -> Callable[[], None]:
    """The conv's step of a model of one conv, alone."""
    runner: Runner = cast("Any", type(fast)).runner
    planned = next(reversed(runner.plans.values()))
    plan, memories = planned.plans[len(x)]
    run = plan.items[0]
    assert isinstance(run, Run)
    assert run.program is not None
    step = next(s for s, move in zip(run.program.steps, run.moves, strict=True) if move.layer is not None)
    y = torch.empty_like(fast(x))
    outside = [x if node.op == "placeholder" else y for node in plan.outside_nodes(run)]
    memory = memories[0]
    call = Program(plan.target, [step], plan.threads).call([memory.arena.data_ptr(), *(t.data_ptr() for t in outside)])

    def timed(kept: tuple[Any, ...] = (memory, outside)) -> None:  # what the step points into stays alive
        call.run()

    return timed


def measured(
    conv: nn.Conv2d, pool: int | None, x: Tensor, block: str, sparsity: float, pairs: int
) -> Iterator[dict[str, Any]]:
    """One conv at one sparsity, where the engine runs it; both sides are checked on the weights that they have."""
    net = nn.Sequential(conv, nn.ReLU(), *([nn.MaxPool2d(pool)] if pool else []))
    if conv.in_channels <= IMAGE_CHANNELS:
        fast = fxdbsr.convert(net, block_size=parse_block(block))
    else:
        prepared = fxdbsr.prepare(net, parse_block(block))
        fast = fxdbsr.convert(fxdbsr.block_prune_(prepared, sparsity, score="random"), example_inputs=x)
    assert isinstance(fast, ConvertedModule)
    layer = next((module for module in fast.modules() if isinstance(module, PackedConv)), None)
    if layer is None or layer.engine != "cpu":  # no block is left, or not one that the engine takes
        return
    kept = copy.deepcopy(conv)
    with torch.inference_mode():
        macs = conv.weight.numel() * conv(x)[0, 0].numel()
        kept.weight.copy_(layer.weight())
        errors = {"error": error(fast(x), kept, x, pool), "error_dense": error(dense_call(kept, x)(), kept, x)}
        for arm, call in (("step", step_call(fast, x)), ("call", partial(fast, x))):
            ratio = paired(dense_call(conv, x), call, pairs, warm_up=3)
            rate = 2e-6 * macs * layer.density / ratio.arm_ms / peak_gflops()
            about = {"engine": layer.engine, "density": round(layer.density, 4), "peak": round(rate, 4)}
            yield {"arm": arm} | as_row(ratio) | errors | about


def rows_of(name: str, block: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Two rows for each conv and sparsity, then the sums."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model = torchvision.models.get_model(name, weights=None).eval()
    sums: dict[tuple[float, str], list[float]] = {}
    for (c, o, kernel, stride, padding, dilation, groups, size, pool), calls in convs_of(
        model, torch.randn(1, 3, options.size, options.size)
    ).items():
        conv = nn.Conv2d(c, o, kernel, stride, padding, dilation, groups).to(dtype)
        conv = conv.to(memory_format=torch.channels_last).requires_grad_(False).eval()
        x = torch.randn(1, c, *size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        behind = f" max {pool}x{pool}" if pool else ""
        text = f"{c}-{o} {kernel[0]}x{kernel[1]}/{stride[0]} g{groups} @{size[0]}{behind}"
        for sparsity in map(float, options.sparsity.split(",")):
            for row in measured(conv, pool, x, block, sparsity, options.pairs):
                total = sums.setdefault((sparsity, row["arm"]), [0.0, 0.0])
                total[0] += calls * row["base_ms"]
                total[1] += calls * row["arm_ms"]
                yield {"conv": text, "calls": calls, "sparsity": sparsity} | row
    for (sparsity, arm), (base, sparse) in sums.items():
        ratio = {"median": round(base / sparse, 4), "base_ms": round(base, 4), "arm_ms": round(sparse, 4)}
        yield {"conv": "sum", "sparsity": sparsity, "arm": arm} | ratio


def main() -> None:
    """Measure, write the file, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--sparsity", default="0,0.5,0.7,0.9")
    parser.add_argument("--block", default="32x32")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--json", type=Path, help="file that is written at the end")
    options = parser.parse_args()
    rows = [
        {"model": options.model, "block": block, "dtype": options.dtype} | row
        for block in options.block.split(",")
        for row in rows_of(options.model, block, options)
    ]
    if options.json:
        write_lines(options.json, rows)
    print(tabulate([[row.get(c, "") for c in COLUMNS] for row in rows], headers=COLUMNS, floatfmt=".3g"))


if __name__ == "__main__":
    main()
