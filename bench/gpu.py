"""The Triton engine on a GPU: numbers first, then time, one layer at a time.

    python -m bench.gpu                     correctness, then ResNet-50 and VGG-11, 8 minutes at most
    python -m bench.gpu --part compile      the same layers against torch.compile (max-autotune, CUDA graphs)
    python -m bench.gpu --offline           no GPU: the planner's estimates, marked `measured: false`

Every case is one JSON object on a line of the output file; a second run skips the cases that are there. Times
are medians over replays of CUDA graphs, sparse and dense in turns, in one process. Data stay in L2 where they
fit. Both sides have a bias and a ReLU. Exits 2 where there is no GPU, unless called with --offline; 1 where a
kernel gave wrong numbers.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels import triton as engine
from fxdbsr.kernels.triton_roofline import Layer, choose, why_dense
from fxdbsr.kernels.triton_tune import forms, graph_milliseconds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the CPU only for estimates and tests
# Forms in which compilers have been known to lose a barrier: repeated 50 times as often.
RACY = ("bitmask", "3xtf32")
PARTS = ("correctness", "layers", "candidates", "compile", "bsr")
MODELS = ("resnet50", "vgg11", "resnext50_32x4d")
BLOCKS = {"32x32": (32, 32), "64x16": (64, 16), "64x32": (64, 32), "128x32": (128, 32)}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
DEFAULT = {
    "part": ("correctness", "layers"),
    "model": MODELS[:2],
    "dtype": ("fp16", "tf32", "fp32"),
    "batch": (32,),
}


@dataclass(frozen=True)
class Conv:
    """One distinct conv of a model, and how often it occurs."""

    channels: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    size: tuple[int, int]

    @property
    def name(self) -> str:
        """Such as "64->64 3x3 at 56 /2 g32"."""
        text = f"{self.channels}->{self.outputs} {self.kernel[0]}x{self.kernel[1]} at {self.size[0]}"
        text += f" /{self.stride[0]}" if self.stride[0] > 1 else ""
        return text + (f" g{self.groups}" if self.groups > 1 else "")

    def layer(self, batch: int, dtype: torch.dtype, block: tuple[int, int], density: float) -> Layer:
        shape = (self.outputs, self.channels // self.groups, *self.kernel)
        grid = BlockGrid.of(shape, block, self.groups)
        return Layer(grid, batch, self.size, self.stride, self.padding, (1, 1), dtype, density)


def convs(model: str) -> dict[Conv, int]:
    """Distinct convs of a torchvision model at 224x224, with their counts."""
    found: dict[Conv, int] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        assert not isinstance(module.padding, str)
        kernel, stride, padding = ((pair[0], pair[1]) for pair in (module.kernel_size, module.stride, module.padding))
        size = (inputs[0].shape[2], inputs[0].shape[3])
        conv = Conv(module.in_channels, module.out_channels, kernel, stride, padding, module.groups, size)
        found[conv] = found.get(conv, 0) + 1

    with torch.device("meta"):
        network = torchvision.models.get_model(model).eval()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        network(torch.empty(1, 3, 224, 224))
    return found


def set_precision(dtype: str) -> None:
    """Let float32 convs use tf32 only where `dtype` says so, in cuDNN and in the engine alike."""
    torch.backends.cudnn.conv.fp32_precision = "tf32" if dtype == "tf32" else "ieee"  # type: ignore[attr-defined]


@dataclass
class Problem:
    """Tensors of one case on the GPU."""

    layer: Layer
    x: Tensor
    weight: Tensor
    bias: Tensor
    packed: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, layer: Layer) -> Problem:
        generator = torch.Generator().manual_seed(0)
        grid = layer.grid
        keep = torch.rand(grid.shape, generator=generator) < layer.density
        weight = torch.randn(grid.weight_shape, generator=generator) / prod(grid.weight_shape[1:]) ** 0.5
        weight = (weight * grid.expand_mask(keep)).to(layer.dtype)
        x = torch.randn(layer.batch, grid.in_channels, *layer.size, generator=generator).to(layer.dtype)
        bias = torch.randn(grid.out_channels, generator=generator).to(layer.dtype)
        values, crow, col = (t.to(DEVICE) for t in grid.pack(weight, keep))
        x, weight = (t.to(DEVICE).contiguous(memory_format=torch.channels_last) for t in (x, weight))
        return cls(layer, x, weight, bias.to(DEVICE), (values, crow, col))

    def dense(self) -> Tensor:
        layer = self.layer
        y = F.conv2d(self.x, self.weight, self.bias, layer.stride, layer.padding, 1, layer.grid.groups)
        return F.relu_(y)

    def sparse(self, **choice: Any) -> Callable[[], Tensor]:
        layer, grid = self.layer, self.layer.grid
        geometry = (layer.stride, layer.padding, layer.dilation)
        tables = engine.tables(grid, *self.packed, *geometry, **choice)
        sizes = (grid.in_channels, grid.out_channels)

        def run() -> Tensor:
            return engine.conv(
                self.x, *self.packed, self.bias, None, tables, *sizes, *geometry, grid.groups, "relu", 0.0
            )

        return run

    def error(self, y: Tensor) -> tuple[float, float]:
        """Largest error of `y` and of eager against float64 on the first image; NaN counts as infinite."""
        layer = self.layer
        exact = F.relu(
            F.conv2d(
                self.x[:1].double(), self.weight.double(), self.bias.double(),
                layer.stride, layer.padding, 1, layer.grid.groups,
            )
        )  # fmt: skip
        ulp = torch.finfo(layer.dtype).eps * exact.abs().max().item()
        ours = (y[:1] - exact).abs().max().nan_to_num(float("inf")).item()
        return ours, 2 * (self.dense()[:1] - exact).abs().max().item() + ulp


def measure(part: str, layer: Layer, repeats: int) -> dict[str, Any]:
    """The record of one case: errors first, times only where they are right."""
    problem = Problem.of(layer)
    chosen: dict[str, dict[str, Any]] = {"chosen": {}}
    if part in ("correctness", "candidates"):
        chosen |= forms(layer.grid, layer.dtype, allow_3xtf32=True)
    runs: dict[str, Callable[[], Tensor]] = {}
    record: dict[str, Any] = {}
    for name, choice in chosen.items():
        run = problem.sparse(**choice)
        first = run()
        error, allowed = problem.error(first)
        often = repeats * (50 if name in RACY else 1)
        same = all(torch.equal(run(), first) for _ in range(often))
        record[f"error {name}"] = error
        if error > allowed or not same:
            return {"wrong": name, "allowed": allowed, "repeats equal": same, **record}
        runs[name] = run
    if part == "correctness":
        return record
    runs["dense"] = problem.dense
    if part == "compile":
        compiled = torch.compile(problem.dense, mode="max-autotune-no-cudagraphs", dynamic=False)
        runs["compiled"] = compiled
    if part == "bsr":
        grid = layer.grid
        matrix = problem.weight.flatten(1).contiguous().to_sparse_bsr(grid.block_size)
        columns = problem.x.permute(0, 2, 3, 1).flatten(0, 2).t()
        runs["bsr"] = lambda: matrix @ columns
    ms = graph_milliseconds(runs)
    return {
        **record,
        **{f"ms {name}": value for name, value in ms.items()},
        "ratio": ms["dense"] / ms["chosen"],
    }


def cases(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Layer, str | None]]:
    """(key, layer, reason why the engine cannot run it) of every case asked for."""
    for part, model in product(options.part, options.model):
        batches = (2,) if part == "correctness" else options.batch
        settings = product(convs(model).items(), options.dtype, batches, options.block, options.sparsity)
        for (conv, count), dtype, batch, block, sparsity in settings:
            set_precision(dtype)
            layer = conv.layer(batch, DTYPES[dtype], BLOCKS[block], 1 - sparsity / 100)
            key = {"part": part, "model": model, "layer": conv.name, "count": count}
            key |= {"dtype": dtype, "batch": batch, "block": block, "sparsity": sparsity}
            geometry = (layer.stride, layer.padding, layer.dilation)
            reason = engine.why_not(layer.grid, *geometry, layer.dtype, torch.device("cuda"))
            if part == "bsr" and (conv.kernel != (1, 1) or conv.stride != (1, 1)):
                reason = "bsr runs 1x1 convs of stride 1"
            yield key, layer, reason


def estimate(layer: Layer, reason: str | None) -> dict[str, Any]:
    """What the roofline says of a layer, microseconds, and the planner's choice with its reason."""
    reason = reason or why_dense(layer)
    choice = choose(layer)
    return {
        "choice": "dense" if reason else f"sparse, {choice.rows_per_union} rows to a union",
        "reason": reason,
        "estimated sparse us": round(choice.sparse * 1e6, 2),
        "estimated dense us": round(choice.dense * 1e6, 2),
        "ceiling": round(choice.ceiling, 2),
    }


def machine() -> dict[str, str]:
    """Where and with what the numbers were made."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    return {"device": device, "commit": commit, "torch": torch.__version__, "triton": version}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=DEFAULT["part"])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=DEFAULT["model"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DEFAULT["dtype"])
    parser.add_argument("--batch", nargs="+", type=int, default=DEFAULT["batch"])
    parser.add_argument("--block", nargs="+", choices=BLOCKS, default=("32x32", "64x16"))
    parser.add_argument("--sparsity", nargs="+", type=int, default=(50, 70, 90), help="percent")
    parser.add_argument("--repeats", type=int, default=20, help="runs that must agree bit for bit")
    parser.add_argument("--seconds", type=float, default=480, help="start no case after this time")
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu.jsonl"))
    parser.add_argument("--offline", action="store_true", help="estimates only, no GPU needed")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases that the output file does not hold yet."""
    options = parse(arguments)
    if not options.offline and not torch.cuda.is_available():
        print("bench.gpu: no GPU here; --offline prints the planner's estimates", file=sys.stderr)
        return 2
    stop = time.monotonic() + options.seconds
    where = machine()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {(json.dumps(r["key"]), r["measured"], r["device"]) for r in map(json.loads, lines)}
    wrong = 0
    with options.out.open("a") as file:
        for key, layer, reason in cases(options):
            if (json.dumps(key), not options.offline, where["device"]) in done:
                continue
            if time.monotonic() > stop:
                print(f"bench.gpu: {options.seconds} s are over, run again for the rest", file=sys.stderr)
                break
            record: dict[str, Any] = {
                "key": key,
                "measured": not options.offline,
                **where,
                **estimate(layer, reason),
            }
            if reason is None and not options.offline:
                record |= measure(key["part"], layer, options.repeats)
            wrong += "wrong" in record
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(_line(record), flush=True)
    return int(wrong > 0)


def _line(record: dict[str, Any]) -> str:
    key = record["key"]
    text = f"{key['model']:16} {key['layer']:24} {key['dtype']:5} b{key['batch']:<4}"
    text += f"{key['block']:7} {key['sparsity']} % "
    if "wrong" in record:
        return text + f"WRONG: {record['wrong']}"
    text += f"ceiling {record['ceiling']:5.2f}x "
    if "ratio" in record:
        ms = ", ".join(f"{name[3:]} {1e3 * value:.1f} us" for name, value in record.items() if name.startswith("ms "))
        text += f"{record['ratio']:.2f}x measured: {ms}; "
    return text + f"{record['choice']}" + (f": {record['reason']}" if record["reason"] else "")


if __name__ == "__main__":
    sys.exit(main())
