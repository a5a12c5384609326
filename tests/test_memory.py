"""Converting, copying, loading and running again and again leaves no objects, sources, code or files behind."""

from __future__ import annotations

import copy
import gc
import linecache
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.fx import graph_module

import fxdbsr
from bench.small_net import SmallNet, sparse


def state() -> dict[str, int]:
    """Counts of what a leak would add to."""
    gc.collect()
    return {
        "objects": len(gc.get_objects()),
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
        "sources": len(graph_module._loader.eval_cache),
        "lines": len(linecache.cache),
        "files": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,
    }


def leaves_nothing(step: Callable[[], object], rounds: int = 12) -> None:
    for _ in range(3):
        step()
    before = state()
    for _ in range(rounds):
        step()
    after = state()
    grown = {name: count - before[name] for name, count in after.items()}
    # a few objects come and go with the interpreter's own caches; a leak would be some in every round
    assert grown.pop("objects") < 3 * rounds
    assert not any(count > 0 for count in grown.values()), grown


@pytest.mark.parametrize("backend", ["auto", "reference", "dense"])
def test_conversions_leave_nothing_behind(backend: str) -> None:
    x = torch.randn(2, 3, 12, 12)
    prepared = sparse(SmallNet(), x, 8)
    leaves_nothing(lambda: fxdbsr.convert(prepared, backend=backend)(x))


def test_copies_loads_and_dense_models_leave_nothing_behind(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 12, 12)
    prepared = sparse(SmallNet(), x, 8)
    fast, path, dense = fxdbsr.convert(prepared), tmp_path / "model.pt", SmallNet()
    fxdbsr.save(fast, path)

    def step() -> None:
        for model in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), fxdbsr.load(dense, path)):
            model(x)
        fxdbsr.to_dense(fast)(x)
        fxdbsr.report(fast, x)
        fxdbsr.prepare(dense, 4)

    leaves_nothing(step, 5)


def test_inferences_of_many_sizes_leave_nothing_behind() -> None:
    fast = fxdbsr.convert(sparse(SmallNet(), torch.randn(2, 3, 12, 12), 8))
    sizes = [(1 + n % 3, 3, 8 + n, 12) for n in range(6)]

    def step() -> None:
        with torch.inference_mode():
            for size in sizes:
                fast(torch.randn(size))

    leaves_nothing(step)
