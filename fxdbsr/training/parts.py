"""The parts of a training that the options choose: wrapper, optimizer, learning rates, sparsifier, autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from fxdbsr.digits import learning_rate
from fxdbsr.scales import param_groups
from fxdbsr.sparsifier import Sparsifier
from fxdbsr.training.options import Options
from fxdbsr.training.processes import Processes

DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def is_sharded(options: Options, processes: Processes) -> bool:
    """True where parameters are spread over the processes."""
    return options.parallel == "fsdp" and processes.count > 1


def wrapped(net: nn.Module, options: Options, processes: Processes) -> nn.Module:
    """What is called in place of `net`: compiled, replicated or, in place, sharded."""
    model: Any = net
    if is_sharded(options, processes):
        fully_shard(model.to(memory_format=torch.contiguous_format))  # shards have to be contiguous
    if options.compile:
        model = torch.compile(model)
    if processes.count > 1 and not is_sharded(options, processes):
        model = nn.parallel.DistributedDataParallel(model)
    return model  # type: ignore[no-any-return]


def make_optimizer(net: nn.Module, options: Options) -> Optimizer:
    """The optimizer of `net`, with weight decay on the weights alone."""
    groups = param_groups(net, options.weight_decay)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr)
    return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0)


def rate(options: Options, step: int, steps: int) -> float:
    """The learning rate of step number `step`, counted from 0, of `steps`."""
    return options.lr * learning_rate(step, steps, options.warmup)


def make_sparsifier(
    model: nn.Module, optimizer: Optimizer, options: Options, steps: int, example: torch.Tensor
) -> Sparsifier:
    """The sparsifier that rides on `optimizer` for `steps` steps; MACs are those of `example`."""
    return Sparsifier(
        model,
        optimizer,
        target=options.target,
        gamma=options.gamma,
        shrink=options.shrink,
        of=options.of,
        steps=steps,
        begin=options.begin,
        end=options.end,
        example_inputs=example,
        lr_schedule=None if options.gamma is None else [rate(options, step, steps) for step in range(steps)],
    )


def autocast(options: Options, device: torch.device) -> Any:
    """The context in which forwards run."""
    return torch.autocast(device.type, dtype=DTYPES[options.amp], enabled=options.amp != "off")
