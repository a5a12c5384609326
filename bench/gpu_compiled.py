"""Dense networks, eager and by torch.compile, within the time that is left.

A first run on a GPU is short, and max-autotune takes minutes: the baseline is compiled before what stands beside it,
and by the default mode where nothing better can be had; a record says how.
"""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from bench.gpu_networks import call_of, images, network
from bench.gpu_setting import DTYPES, Setting

DEFAULT_SECONDS = 75  # that torch.compile's default mode may take
FOLDED_SECONDS = 150  # that must be left to compile a second network
BOTH_SECONDS = 90  # that must be left for the default mode beside max-autotune
AGAIN_SECONDS = 3


def give_inductor_tritons_assembler() -> None:
    """Have torch.compile's workers find in Triton's cache what the main process compiles, and the other way round.

    They would take torch's own ptxas, whose version is a part of the cache's keys, and max-autotune compile all twice.
    """
    found = find_spec("triton")
    if found is not None and found.origin is not None:
        path = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
        if path.exists():
            os.environ.setdefault("TRITON_PTXAS_PATH", str(path))


@lru_cache(1)
def dense_arms(
    model: str, dtype: str, batch: int, setting: Setting
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """eager, compiled, default mode and folded, compiled once for all sparsities, and how each was, or why not.

    Beside max-autotune stands the default mode, which was the faster one for ResNet-50 on an H100. The last network's
    arms are dropped.
    """
    net = network(model).to(setting.device, DTYPES[dtype]).to(memory_format=torch.channels_last)
    x = images(model, batch, setting.rehearse).to(setting.device, DTYPES[dtype])
    torch._dynamo.reset()
    arms, notes = {"eager": call_of(net, x)}, {}
    nets = {"compiled": net}
    if any(isinstance(module, nn.BatchNorm2d) for module in net.modules()) and model != "fpn_resnet50":
        nets["folded"] = fuse(copy.deepcopy(net)).to(memory_format=torch.channels_last)
    for name, dense in nets.items():
        if name == "folded" and setting.left() < FOLDED_SECONDS:
            notes[name] = "left out: too little time was left"
            continue
        compiled, notes[name] = compile_within(dense, x, setting, alone=name == "compiled")
        if compiled is not None:
            arms[name] = compiled
        if name == "compiled" and notes[name] == "max-autotune" and setting.left() > BOTH_SECONDS:
            with suppress(Exception), deadline(DEFAULT_SECONDS):
                call = call_of(torch.compile(net, dynamic=False, mode=None), x)
                call()
                arms["default mode"] = call
    return arms, notes


def compile_within(net: nn.Module, x: Tensor, setting: Setting, alone: bool) -> tuple[Callable[[], Any] | None, str]:
    """A call of the compiled network, and how it was compiled.

    By max-autotune, or, where that takes too long or fails, by the default mode; None where that does as well.

    Args:
        alone: nothing was compiled before that a reset of the compiler would take along.
    """
    if setting.rehearse:
        return call_of(torch.compile(net, dynamic=False, backend="eager"), x), "rehearsal"
    reason = ""
    tuning = min(setting.tuning, setting.left() - DEFAULT_SECONDS)
    for name, mode, seconds in (
        ("max-autotune", "max-autotune-no-cudagraphs", tuning),
        ("default mode", None, DEFAULT_SECONDS),
    ):
        try:
            with deadline(seconds):
                call = call_of(torch.compile(net, dynamic=False, mode=mode), x)
                call()
                return call, f"{name}{reason}"
        except Exception as error:
            reason = f"{reason}: {name} ended in {type(error).__name__}: {str(error)[-200:]}"
        if alone:
            torch._dynamo.reset()
    return None, f"not compiled{reason}"


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after that long, and again if it is caught there; in the main thread alone."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"over {seconds:.0f} s")

    if seconds <= 0:
        raise TimeoutError("no time was left")
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
