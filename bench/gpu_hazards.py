"""What compilers and callers can get wrong, on the device.

repeats     every kernel and precision on four layers, 1000 runs that must agree bit for bit, while the L2 is
            flushed and another stream is busy; the first against float64
streams     several streams at once, each with inputs of its own
graph       captured once, replayed with new inputs in the same place
compile     torch.compile(fullgraph=True) of a converted model, and torch.export
host        nothing in a forward waits for the GPU
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import fxdbsr
from bench.gpu_convs import Conv, Problem
from bench.gpu_networks import pruned
from bench.gpu_setting import DTYPES, Case, Setting, set_precision
from fxdbsr.kernels.triton_layer import Layer
from fxdbsr.kernels.triton_timing import captured
from fxdbsr.kernels.triton_tune import Candidate, candidates

CONVS = {
    "1x1": Conv(256, 256, (1, 1), (1, 1), (0, 0), 1, (14, 14), True, "relu"),
    "3x3": Conv(128, 256, (3, 3), (1, 1), (1, 1), 1, (28, 28), True, "relu"),
    "3x3 /2": Conv(128, 256, (3, 3), (2, 2), (1, 1), 1, (28, 28), False, "relu"),
    "7x7": Conv(64, 128, (7, 7), (1, 1), (3, 3), 1, (14, 14), False, "none"),
}
REPEATS = 1000


def repeated_layer(name: str, dtype: str, small: bool = False) -> Layer:
    """The conv of that name with two blocks of five, 3xTF32 allowed."""
    conv = CONVS[name].small() if small else CONVS[name]
    return replace(conv.layer(8, DTYPES[dtype], (32, 32), 0.4), allow_3xtf32=True)


def repeated_forms(layer: Layer, device: torch.device) -> dict[str, Candidate]:
    """Every form of the layer, by name; every tile of two of them."""
    return candidates(layer, device, 2)


def repeats(name: str, dtype: str, setting: Setting) -> dict[str, Any]:
    """Every form and tile of one conv: its error, and how many of the runs differ from the first."""
    set_precision(dtype)
    layer = repeated_layer(name, dtype, setting.rehearse)
    problem = Problem.of(layer, setting.device, 1)
    found = {}
    for form, arguments in repeated_forms(layer, setting.device).items():
        run = problem.sparse(**arguments)
        reason = problem.why_wrong(run, 0)
        differing = 0 if reason else unequal(run, problem.inputs[0], 2 if setting.rehearse else REPEATS)
        if reason or differing:
            found[form] = reason or f"{differing} of {REPEATS} runs differ"
    return {"wrong": found} if found else {"runs": REPEATS}


def unequal(run: Callable[[Tensor, Tensor | None], Tensor], inputs: tuple[Tensor, Tensor | None], times: int) -> int:
    """Runs whose bits differ from the first's, with the L2 flushed and another stream busy now and then."""
    first = run(*inputs)
    device = first.device
    differing = torch.zeros((), dtype=torch.int32, device=device)
    if device.type == "cpu":
        return sum(not torch.equal(run(*inputs), first) for _ in range(times))
    flush = torch.empty(30_000_000, device=device)
    noise, side = torch.randn(1024, 1024, device=device), torch.cuda.Stream()
    for i in range(times):
        if i % 8 == 1:
            flush.fill_(i)
        if i % 3 == 2:
            with torch.cuda.stream(side):
                torch.mm(noise, noise)
        differing += (run(*inputs) != first).any()
    return int(differing)


def streams(name: str, dtype: str, setting: Setting) -> dict[str, Any]:
    """Four streams at once give what each gives alone."""
    set_precision(dtype)
    conv = CONVS[name].small() if setting.rehearse else CONVS[name]
    problem = Problem.of(conv.layer(1, DTYPES[dtype], (32, 32), 0.4), setting.device, 4)
    run = problem.sparse()
    alone = [run(*inputs) for inputs in problem.inputs]
    if setting.rehearse:
        return {"equal": all(torch.equal(run(*i), y) for i, y in zip(problem.inputs, alone, strict=True))}
    torch.cuda.synchronize()
    lanes = [torch.cuda.Stream() for _ in problem.inputs]
    together: list[list[Tensor]] = [[] for _ in lanes]
    for _ in range(50):
        for stream, inputs, outputs in zip(lanes, problem.inputs, together, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(run(*inputs))
    torch.cuda.synchronize()
    equal = all(torch.equal(y, expected) for ys, expected in zip(together, alone, strict=True) for y in ys)
    return {"equal": True} if equal else {"wrong": "outputs on several streams differ from those on one"}


def converted(setting: Setting, dtype: str, model: str = "resnet50") -> tuple[nn.Module, Tensor]:
    """A converted network, every conv on the Triton engine that it can run, and an input."""
    source = pruned("tiny" if setting.rehearse else model, (32, 32), 0.5).to(setting.device)
    fast = fxdbsr.convert(source, backend="triton").to(DTYPES[dtype]).to(memory_format=torch.channels_last)
    size = 8 if setting.rehearse else 224
    x = torch.randn(2, 3, size, size, device=setting.device, dtype=DTYPES[dtype])
    return fast, x.contiguous(memory_format=torch.channels_last)


def graph(name: str, dtype: str, setting: Setting) -> dict[str, Any]:
    """A CUDA graph of a whole network, replayed with other inputs."""
    set_precision(dtype)
    model, x = converted(setting, dtype)
    with torch.inference_mode():
        if setting.rehearse:
            model(x)
            return {"equal": None}
        outputs: list[Tensor] = []
        replayed = captured(lambda: outputs.append(model(x)))
        for seed in range(5):
            x.normal_(generator=torch.Generator(x.device).manual_seed(seed))
            replayed.replay()
            torch.cuda.synchronize()
            if not torch.equal(outputs[-1], model(x)):
                return {"wrong": f"replay {seed} differs from the eager run"}
    return {"equal": True}


def compiled(name: str, dtype: str, setting: Setting) -> dict[str, Any]:
    """torch.compile with the whole graph, and torch.export, compute what eager computes."""
    set_precision(dtype)
    model, x = converted(setting, dtype)
    torch._dynamo.reset()
    backend = "eager" if setting.rehearse else "inductor"
    with torch.inference_mode():
        expected = model(x)
        found = {
            "compile": torch.compile(model, fullgraph=True, dynamic=False, backend=backend)(x),
            "export": torch.export.export(copy.deepcopy(model), (x,)).module()(x),
        }
    scale = expected.abs().max()
    errors = {way: float((y - expected).abs().max() / scale) for way, y in found.items()}
    limit = 4e-2 if DTYPES[dtype].itemsize == 2 else 1e-2
    return {"wrong": errors} if max(errors.values()) > limit else {"relative errors": errors}


def host(name: str, dtype: str, setting: Setting) -> dict[str, Any]:
    """A forward in which any wait for the GPU is an error."""
    set_precision(dtype)
    model, x = converted(setting, dtype)
    with torch.inference_mode():
        model(x)
        if setting.rehearse:
            return {"waits": None}
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"waits": 0}


CHECKS = {"host": host, "graph": graph, "streams": streams, "repeats": repeats, "compile": compiled}  # quick ones first
OF_A_LAYER = ("repeats", "streams")


def cases(options: Any) -> Iterator[Case]:
    """Every check in every dtype asked for."""
    for check, dtype in product(CHECKS, options.dtype):
        for name in CONVS if check in OF_A_LAYER else ("network",):
            yield _case(check, name, dtype)


def _case(check: str, name: str, dtype: str) -> Case:
    key = {"part": "hazards", "check": check, "of": name, "dtype": dtype}
    return Case(key, dict, lambda setting: CHECKS[check](name, dtype, setting))
