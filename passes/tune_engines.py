"""packed conv on the engine of the rule -> packed conv on the engine that is fastest on the example inputs.

Runs last, when epilogues are fused. One forward records what each packed conv sees; the engines that can run it
and dense are then checked against the reference and timed in turn, and the lowest median wins.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
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
    form: dict[str, Any] = {}
    for engine in layer.candidates():
        layer.use(engine, "")
        if engine == "triton":
            layer.form = form = fastest_form(layer, *arguments)
            layer.derive()
        if is_right(layer(*arguments), expected):
            times[engine] = []
    if layer.values.is_cuda:
        times = graph_times(layer, arguments, list(times))
    for _ in range(ROUNDS if not layer.values.is_cuda else 0):
        for engine, found in times.items():
            layer.use(engine, "")
            layer(*arguments)
            found.append(seconds(layer, arguments))
    medians = {engine: median(found) for engine, found in times.items()}
    shown = ", ".join(f"{engine} {1e3 * value:.3f} ms" for engine, value in medians.items())
    fastest = min(medians, key=lambda engine: medians[engine])
    shown += f" ({', '.join(f'{name} {value}' for name, value in form.items())})" if fastest == "triton" else ""
    layer.use(fastest, f"measured: {shown}")


def fastest_form(layer: PackedConv, x: Tensor, residual: Tensor | None = None) -> dict[str, Any]:
    """The fastest form of the Triton engine for `layer` on `x`, numbers checked, as arguments of its `tables`."""
    from fxdbsr.kernels.triton_tune import tune

    packed = (layer.values, layer.crow_indices, layer.col_indices)
    geometry = (layer.stride, layer.padding, layer.dilation)
    x = x if layer.pad is None else F.pad(x, layer.pad[0], layer.pad[1])
    x = x.to(layer.values.dtype)
    added = residual if layer._fits(x, residual) else None
    chosen, _ = tune(
        layer.grid, *packed, *geometry, x, layer.bias, added, layer.activation, layer.negative_slope
    )  # fmt: skip
    return chosen


def graph_times(layer: PackedConv, arguments: tuple[Any, ...], engines: list[str]) -> dict[str, list[float]]:
    """Seconds of a call on each engine, replayed as CUDA graphs in turns, so that Python's launches do not count."""
    from fxdbsr.kernels.triton_timing import captured, replayed_in_turns

    graphs, kept = {}, []
    for engine in engines:
        layer.use(engine, "")
        graphs[engine] = captured(lambda: layer(*arguments), calls=10)
        kept.append(layer.derived())  # a graph reads what the layer held when it was made
    return {engine: [1e-3 * t for t in found] for engine, found in replayed_in_turns(graphs, 0.2, 10).items()}


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
