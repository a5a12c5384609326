"""Where the time of a network goes: its kernels in the order in which they run, dense and converted.

Each arm runs eagerly under the profiler; a kernel's time is the median over runs, without the gaps between kernels
that a CUDA graph has. Taken after the timings of the same networks, for whose arms it has them compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu_compiled import dense_arms
from bench.gpu_networks import call_of, images, pruned, sparse_arms
from bench.gpu_setting import BLOCKS, DTYPES, Case, Setting, set_precision

RUNS = 5


def kernels(call: Callable[[], Any]) -> list[tuple[str, float]]:
    """Name and microseconds of every kernel of a call."""
    call()
    torch.cuda.synchronize()
    found = []
    for _ in range(RUNS):
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        events = [e for e in profiler.events() or [] if e.device_type.name == "CUDA"]
        events.sort(key=lambda event: event.time_range.start)
        found.append([(event.name, event.time_range.elapsed_us()) for event in events])
    alike = [run for run in found if len(run) == len(found[-1])]
    return [(one[0][0][:120], round(median(time for _, time in one), 2)) for one in zip(*alike, strict=True)]


def measure(
    model: str, dtype: str, batch: int, block: tuple[int, int], sparsity: float, masks: str, setting: Setting
) -> dict[str, Any]:
    """The kernels of every arm, and the sums of their times."""
    set_precision(dtype)
    with torch.no_grad():
        x = images(model, batch, setting.rehearse).to(setting.device, DTYPES[dtype])
        arms = sparse_arms(pruned(model, block, sparsity, masks), x, dtype)
        dense, _ = dense_arms(model, dtype, batch, setting)
        calls = {name: call for name, call in dense.items() if name != "folded"}
        calls |= {name: call_of(arm, x) for name, arm in arms.items()}
        if setting.rehearse:
            return {"kernels": {name: [] for name in calls}}
        found = {name: kernels(call) for name, call in calls.items()}
    return {"us": {name: round(sum(t for _, t in run), 1) for name, run in found.items()}, "kernels": found}


def cases(options: Any) -> Iterator[Case]:
    """The networks asked for, at the first and the last sparsity."""
    ends = dict.fromkeys((options.sparsity[0], options.sparsity[-1]))
    networks = product(options.model, options.dtype, options.batch)
    for (model, dtype, batch), masks, block, sparsity in product(networks, options.masks, options.block, ends):
        key = {"part": "timeline", "model": model, "dtype": dtype, "batch": batch, "block": block}
        yield _case({**key, "sparsity": sparsity, "masks": masks}, options.rehearse)


def _case(key: dict[str, Any], rehearse: bool) -> Case:
    model, dtype, batch, block, sparsity = (key[name] for name in ("model", "dtype", "batch", "block", "sparsity"))
    run, size = ("tiny", 2) if rehearse else (model, batch)
    return Case(
        key, dict, lambda setting: measure(run, dtype, size, BLOCKS[block], sparsity / 100, key["masks"], setting)
    )
