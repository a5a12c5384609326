"""packed conv on the engine of the rule -> packed conv on the engine that is fastest on the example inputs.

Runs last, when epilogues are fused. One forward records what each packed conv sees; the engines that can run it
and dense are then checked against the reference and timed in turn, and the lowest median wins.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx

from fxdbsr.graph import called_module
from fxdbsr.nn.packed import PackedConv
from fxdbsr.passes.lowering import Lowering

ROUNDS = 7
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def tune_engines(model: fx.GraphModule, lowering: Lowering) -> None:
    """Measure the engines of every packed conv and take the fastest, where tuning was asked for.

    Raises:
        ValueError: the model's forward fails on the example inputs.
    """
    if not lowering.tune:
        return
    layers = {str(n.target): m for n in model.graph.nodes if isinstance(m := called_module(n), PackedConv)}
    seen: dict[str, tuple[Any, ...]] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args) and None)
        for name, layer in layers.items()
    ]
    try:
        with torch.inference_mode():
            model(*lowering.example_inputs)
    except Exception as error:
        raise ValueError(f"example_inputs: the model's forward fails on them: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    for name, arguments in seen.items():
        with torch.inference_mode():
            take_fastest(layers[name], arguments)


def take_fastest(layer: PackedConv, arguments: tuple[Any, ...]) -> None:
    """Let `layer` run on the engine with the lowest median time among those that are right on `arguments`."""
    layer.use("reference", "")
    expected = layer(*arguments)
    times: dict[str, list[float]] = {}
    for engine in layer.candidates():
        layer.use(engine, "")
        if is_right(layer(*arguments), expected):
            times[engine] = []
    for _ in range(ROUNDS):
        for engine, found in times.items():
            layer.use(engine, "")
            layer(*arguments)
            found.append(seconds(layer, arguments))
    medians = {engine: median(found) for engine, found in times.items()}
    shown = ", ".join(f"{engine} {1e3 * value:.3f} ms" for engine, value in medians.items())
    layer.use(min(medians, key=lambda engine: medians[engine]), f"measured: {shown}")


def is_right(found: Tensor, expected: Tensor) -> bool:
    """True where `found` differs from `expected` by rounding alone, relative to the largest output."""
    if not expected.numel():
        return True
    worst = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return bool(worst <= TOLERANCE[expected.dtype])


def seconds(layer: PackedConv, arguments: tuple[Any, ...]) -> float:
    """Wall time of one call, waiting for the device."""
    wait(layer.values)
    start = time.perf_counter()
    layer(*arguments)
    wait(layer.values)
    return time.perf_counter() - start


def wait(tensor: Tensor) -> None:
    """Return when the device of `tensor` has finished what it was given."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
