"""Milliseconds of each layer as it is and in its dense form, on the inputs that it had in the model.

The dense form multiplies the same weight, zeros included, with torch's own kernel, and has the same epilogue.
The two sides are timed in turns and the medians taken, so that a machine that slows down slows both. A layer
without blocks is its own dense form.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxdbsr.kernels.reference import activate
from fxdbsr.nn.packed import PackedConv
from fxdbsr.nn.packed_forward import torch_layer
from fxdbsr.nn.scaled import ScaledFunction, ScaledLayer, plain_type
from fxdbsr.nn.scaling import effective_scale
from fxdbsr.reporting.count import Tally
from fxdbsr.reporting.observe import Call, evaluating
from fxdbsr.reporting.rows import LayerRow

WARM_UP, ROUNDS = 2, 9


def with_times(model: nn.Module, tally: Tally) -> list[LayerRow]:
    """The rows of `tally` with `ms_dense` and `ms`, its calls summed."""
    with evaluating(model):
        times = [[time_call(call) for call in calls] for calls in tally.calls]
    return [
        replace(row, ms_dense=sum(dense for dense, _ in pairs), ms=sum(now for _, now in pairs))
        for row, pairs in zip(tally.rows, times, strict=True)
    ]


def time_call(call: Call) -> tuple[float, float]:
    """(dense, now) of one call, medians in ms."""
    forms = [form for form in (dense_form(call), call.layer) if form is not None]
    samples: list[list[float]] = [[] for _ in forms]
    for turn in range(WARM_UP + ROUNDS):
        for form, times in zip(forms, samples, strict=True):
            _synchronize()
            start = perf_counter()
            form(*call.args, **call.kwargs)
            _synchronize()
            if turn >= WARM_UP:
                times.append((perf_counter() - start) * 1e3)
    medians = [median(times) for times in samples]
    return medians[0], medians[-1]


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def dense_form(call: Call) -> Callable[..., Any] | None:
    """What `call` would be without blocks, or None where it has none."""
    layer = call.layer
    if isinstance(layer, PackedConv):
        return _dense_conv(layer)
    if isinstance(layer, ScaledFunction):
        weight, scale, mask = call.args[1:4]
        scaled = layer.grid.scale(weight, effective_scale(scale, mask, layer.form))
        return lambda x, weight, scale, mask, bias=None: layer.function(x, scaled, bias, **layer.arguments)
    if isinstance(layer, ScaledLayer):
        kind = plain_type(type(layer))
        assert kind is not None
        plain = copy.copy(layer)
        plain.__dict__ = dict(layer.__dict__)
        bias = layer._parameters.get("bias")
        plain._parameters = {"weight": nn.Parameter(layer.scaled_weight(), False), "bias": bias}
        plain.__class__ = kind  # type: ignore[assignment]
        return plain
    return None


def _dense_conv(layer: PackedConv) -> Callable[..., Tensor]:
    weight = layer.weight()

    def dense(input: Tensor, residual: Tensor | None = None) -> Tensor:
        x = input.to(weight.dtype)
        x = x if layer.pad is None else F.pad(x, *layer.pad)
        y = torch_layer(x, weight, layer.bias, layer)
        return activate(y if residual is None else y + residual, layer.activation, layer.negative_slope)

    return dense
