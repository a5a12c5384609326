"""One training step on the GPU: prepared over dense, with and without torch.compile.

A step is forward, loss, backward and SGD with momentum, channels last; bfloat16 by autocast, or float32 with tf32.
Arms in turns; a ratio is the prepared step's time over the dense one's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fxdbsr
from bench.gpu_networks import network
from bench.gpu_setting import Case, Setting, set_precision
from fxdbsr.paired import quantiles

BATCH = {"resnet50": 64, "vgg11": 64}
ROUNDS = 15


def stepper(model: nn.Module, batch: int, dtype: str, setting: Setting, compile: bool) -> Callable[[], None]:
    """A function that takes one training step."""
    size = 8 if setting.rehearse else 224
    x = torch.randn(batch, 3, size, size, device=setting.device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=setting.device)
    model = model.to(setting.device).to(memory_format=torch.channels_last).train()
    groups = fxdbsr.param_groups(model, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)
    options: dict[str, Any] = {"backend": "eager"} if setting.rehearse else {}
    forward: Any = torch.compile(model, dynamic=False, **options) if compile else model
    autocast = torch.autocast(setting.device.type, torch.bfloat16, enabled=dtype == "bf16")

    def step() -> None:
        optimizer.zero_grad()
        with autocast:
            y = forward(x)
            loss = F.cross_entropy(y.float().flatten(1), labels)
        loss.backward()
        optimizer.step()

    return step


def measure(model: str, dtype: str, compile: bool, setting: Setting) -> dict[str, Any]:
    """Milliseconds of a step, and the ratio, over rounds of dense, prepared, prepared, dense."""
    set_precision(dtype)
    torch._dynamo.reset()
    batch = 2 if setting.rehearse else BATCH[model]
    name = "tiny" if setting.rehearse else model
    dense = network(name)
    steps = [stepper(m, batch, dtype, setting, compile) for m in (dense, fxdbsr.prepare(network(name), (32, 32)))]
    for step in steps * (1 if setting.rehearse else 3):
        step()
    if setting.rehearse:
        return {"ratio": None}
    rounds = [[_milliseconds(steps[i]) for i in (0, 1, 1, 0)] for _ in range(ROUNDS)]
    ratios = [(b + c) / (a + d) for a, b, c, d in rounds]
    return {
        "batch": batch,
        "ratio": [round(value, 4) for value in quantiles(ratios)],
        "ms dense": [round(value, 3) for value in quantiles([t for a, _, _, d in rounds for t in (a, d)])],
        "ms prepared": [round(value, 3) for value in quantiles([t for _, b, c, _ in rounds for t in (b, c)])],
    }


def _milliseconds(step: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def cases(options: Any) -> Iterator[Case]:
    """Eager first: it needs no compilation."""
    for compile, model, dtype in product((False, True), BATCH, ("bf16", "tf32")):
        if model in options.model:
            yield _case(model, dtype, compile)


def _case(model: str, dtype: str, compile: bool) -> Case:
    key = {"part": "training", "model": model, "dtype": dtype, "compile": compile}
    return Case(key, dict, lambda setting: measure(model, dtype, compile, setting))
