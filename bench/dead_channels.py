"""MACs of the main models with and without the removal of dead channels, and seconds that `convert` takes.

    python -m bench.dead_channels [--json bench/results/dead_channels.jsonl]

A third of the block rows of every conv is switched off, at random, the first kept; batch norms get random affine
values and statistics near the data's. "blocks" counts the MACs of the blocks that are not zero alone, "all" what
is left when dead channels are gone, too. Seconds are those of one `convert` with every pass, nodes those of the graph
that it starts from: of nets of one family the milliseconds a node say whether the cost grows faster than the graph.
CPU seconds are those of the process, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import fx, nn

import fxdbsr
from bench.coverage import build, enliven, first_tensor
from fxdbsr.layers import blocked_layers
from fxdbsr.traced import TwoGraphModule

TIMED = "resnet18,resnet50,resnet101,resnet152,densenet121,densenet201,efficientnet_v2_s,efficientnet_v2_l"


def prepared_model(name: str, size: int, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """The torchvision model `name`, a third of the block rows off in every conv, and an input."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, x = fxdbsr.prepare(build(name), (32, 32)), torch.randn(2, 3, size, size)
    for layer in blocked_layers(model):
        rows = layer.mask.shape[0]
        off = 1 + torch.randperm(max(rows - 1, 0), generator=generator)[: round(rows / 3)]
        mask = torch.ones_like(layer.mask)
        mask[off] = False
        layer.set_mask(mask)
    enliven(model, x, generator)
    return model.eval(), x


@torch.no_grad()
def measure(name: str, size: int, compare: bool) -> dict[str, Any]:
    """Seconds, MACs and the largest error of one model; MACs for a batch of 2 at `size`."""
    prepared, x = prepared_model(name, size)
    start, used = time.perf_counter(), time.process_time()
    converted = fxdbsr.convert(prepared, backend="auto")
    seconds, used = time.perf_counter() - start, time.process_time() - used
    traced = prepared.graph_module(False) if isinstance(prepared, TwoGraphModule) else prepared
    assert isinstance(traced, fx.GraphModule)
    nodes = len(traced.graph.nodes)
    row: dict[str, Any] = {"model": name, "size": size, "nodes": nodes, "convert_s": round(seconds, 2)}
    row |= {"convert_cpu_s": round(used, 2), "cpu_ms_a_node": round(1e3 * used / nodes, 2)}
    if compare:
        expected = first_tensor(prepared(x))
        error = (first_tensor(converted(x)) - expected).abs().max() / expected.abs().max()
        before, after = (fxdbsr.report(model, x).total for model in (prepared, converted))
        row |= {"macs_dense": before.macs_dense, "macs_blocks": before.macs, "macs_all": after.macs}
        row |= {"saved": 1 - after.macs / before.macs, "params_blocks": before.params, "params_all": after.params}
        row |= {"error": error.item()}
    return row


def main() -> None:
    """Run, print the table, write JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=64, help="side of the images")
    parser.add_argument("--compare", default="resnet50,vgg11_bn")
    parser.add_argument("--time", default=TIMED)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [measure(name, arguments.size, True) for name in arguments.compare.split(",") if name]
    rows += [measure(name, arguments.size, False) for name in arguments.time.split(",") if name]
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    if arguments.json:
        about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        about |= {"threads": torch.get_num_threads()}  # type: ignore[dict-item]
        arguments.json.write_text("".join(json.dumps(about | row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
