"""What two ranks hold while they train: run by torchrun, writes JSON `{case: [per rank, what it saw]}`.

Every case trains the same small net on the same 16 images a step, half of them on each rank.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import fxdbsr
from fxdbsr.layers import blocked_layers
from fxdbsr.ranks import whole

STEPS = 12


class Net(nn.Module):
    """A stem, two convs with a functional shortcut; the 10 output channels of two ranks are no multiple of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.a, self.b = nn.Conv2d(10, 10, 3, padding=1), nn.Conv2d(10, 10, 3, padding=1)
        self.kernel = nn.Parameter(0.2 * torch.randn(10, 10, 1, 1))
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, 5]`."""
        x = F.adaptive_avg_pool2d(torch.relu(self.stem(x)), 4)
        x = torch.relu(self.b(torch.relu(self.a(x))) + F.conv2d(x, self.kernel))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


def prepared() -> nn.Module:
    torch.manual_seed(0)
    return fxdbsr.prepare(Net(), 4)


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 3, size, size, generator=generator), torch.arange(16) % 5


def train(
    wrap: Callable[[nn.Module], nn.Module],
    options: dict[str, Any],
    rank: int,
    ranks: int,
    uneven: bool = False,
    penalty: float = 0.0,
) -> dict[str, Any]:
    """The zeros after each step, as strings of 0 and 1, whether scales have moved, and the weights in the end."""
    model = wrap(prepared())
    optimizer = torch.optim.SGD(fxdbsr.param_groups(model, 1e-4), lr=0.1, momentum=0.9, nesterov=True)
    sparsifier = fxdbsr.Sparsifier(model, optimizer, **options)
    zeros, moved = [], []
    for step in range(STEPS):
        x, y = batch(step, 8 + 4 * rank if uneven else 8)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[rank::ranks]), y[rank::ranks])
        torch.autograd.backward(loss + penalty * fxdbsr.penalty(model, "params") if penalty else loss)
        optimizer.step()
        zeros.append("".join(str(int(b)) for layer in blocked_layers(model) for b in layer.alive().flatten()))
        moved.append(any(bool((whole(layer.scale.detach()) != 1).any()) for layer in blocked_layers(model)))
    weights = [float(whole(p.detach()).double().square().sum()) for p in model.parameters()]
    sparsity = sparsifier.sparsity("params")
    return {"zeros": zeros, "moved": moved, "weights": weights, "sparsity": sparsity, "frozen": sparsifier.frozen}


def refused(wrap: Callable[[nn.Module], nn.Module], rank: int) -> str:
    """What a target out of reach raises."""
    try:
        train(wrap, {"target": 0.999, "steps": STEPS}, rank, 2)
    except ValueError as error:
        return str(error)
    return ""


def shard_all(model: nn.Module) -> nn.Module:
    """Every blocked layer by itself, then the rest."""
    for name in ("stem", "a", "b"):
        fully_shard(model.get_submodule(name))
    return shard(model)


def shard(model: nn.Module) -> nn.Module:
    fully_shard(model)
    return model


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ddp = nn.parallel.DistributedDataParallel
    ways: dict[str, dict[str, Any]] = {
        "target": {"target": 0.6, "of": "macs", "steps": STEPS},
        "gamma": {"gamma": 0.12},
        "deadly gamma": {"gamma": 50.0},
    }
    seen: dict[str, Any] = {}
    for way, options in ways.items():
        for name, wrap in (("ddp", ddp), ("fsdp", shard), ("fsdp_layers", shard_all)):
            seen[f"{name} {way}"] = train(wrap, options, rank, 2)
    for name, wrap in (("ddp", ddp), ("fsdp", shard), ("fsdp_layers", shard_all)):
        seen[f"{name} penalty"] = train(wrap, ways["target"], rank, 2, penalty=1e-4)
    seen["uneven"] = train(ddp, ways["target"], rank, 2, uneven=True)
    seen["refused"] = refused(shard, rank)
    for name, wrap in (("ddp", ddp), ("fsdp", shard)):
        seen[f"{name} from the middle on"] = train(wrap, ways["target"] | {"begin": 0.5}, rank, 2)
    seen["in advance"] = train(shard, ways["target"] | {"example_inputs": torch.zeros(1, 3, 8, 8)}, rank, 2)
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, seen)
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps({case: [g[case] for g in gathered] for case in seen}))
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo that outlive the group have aborted the interpreter's end


if __name__ == "__main__":
    main()
