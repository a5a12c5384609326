"""The candidates for one packed conv, checked and timed on the input that it sees."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fxdbsr.kernels import tuning
from fxdbsr.kernels.choice import candidates
from fxdbsr.kernels.triton_plan import precision_of
from fxdbsr.nn.packed import PackedConv

ROUNDS = 7
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
TF32_TOLERANCE = 2e-3


def take_fastest(layer: PackedConv, arguments: tuple[Any, ...]) -> None:
    """Let `layer` run on the candidate with the lowest median time among those that are right on `arguments`.

    What was measured before on such a layer is taken where it still is a candidate and right. Where none is right
    torch's own runs the layer, and the reason says so.
    """
    case = layer.case()
    choices = candidates(case)
    if case.device.type == "cuda":
        arguments = (*arguments, *[None] * (2 - len(arguments)), layer.pool)  # which the conv may take in
    expected = arm(layer, "reference", {})(*arguments)
    key = tuning.key_of(case, threads=torch.get_num_threads()) | {"layer": own_shape(layer)}
    known = tuning.recall(key)
    if known is not None and (choice := choices.get(known[0])) is not None:
        layer.use(choice.engine, f"measured before: {shown(known[1])}", choice.form)
        if runs_right(layer, arguments, expected):
            return
    arms = {name: arm(layer, choice.engine, choice.form) for name, choice in choices.items()}
    right = {name: made for name, made in arms.items() if runs_right(made, arguments, expected)}
    if not right:
        layer.use("dense", "measured: no candidate gave the reference's numbers on the example inputs")
        return
    times = milliseconds({name: partial(made, *arguments) for name, made in right.items()}, expected.device)
    best = min(times, key=times.__getitem__)
    layer.use(choices[best].engine, f"measured: {shown(times)}", choices[best].form)
    tuning.keep(key, times)


def own_shape(layer: PackedConv) -> list[int]:
    """What tells `layer` from others that are the same conv once lifted, for torch runs each by its own function.

    A transposed layer ends in 1, others in 0.
    """
    return [*layer.grid.weight_shape, int(layer.grid.transposed)]


def arm(layer: PackedConv, engine: str, form: dict[str, Any]) -> PackedConv:
    """`layer` on another engine; it shares the tensors that the engine leaves as they are."""
    made = copy.copy(layer)
    made._buffers = dict(layer._buffers)
    made.use(engine, "", form)
    return made


def runs_right(made: PackedConv, arguments: tuple[Any, ...], expected: Tensor) -> bool:
    """True where `made` runs on `arguments` and gives `expected`.

    A kernel of the Triton engine may need more than this GPU has, or its compiler may fail.
    """
    try:
        found = made(*arguments)
    except Exception:
        if made.engine != "triton":
            raise
        return False
    return is_right(found, expected)


def is_right(found: Tensor, expected: Tensor) -> bool:
    """True where `found` differs from `expected` by rounding alone, relative to the largest output."""
    if found.shape != expected.shape or bool((found.isnan() != expected.isnan()).any()):
        return False
    worst = (found - expected).nan_to_num(0.0).abs().max() if expected.numel() else torch.zeros(())
    largest = expected.nan_to_num(0.0).abs().max() if expected.numel() else torch.zeros(())
    return bool(worst <= tolerance(expected.dtype, expected.device) * largest)


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """What rounding may change, relative to the largest output: on a GPU cuDNN may round float32 operands to tf32."""
    rounded = device.type == "cuda" and dtype == torch.float32 and precision_of(dtype) == "tf32"
    return TF32_TOLERANCE if rounded else TOLERANCE[dtype]


def milliseconds(calls: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Median milliseconds of each of `calls`, timed in turns."""
    if device.type == "cuda":
        from fxdbsr.kernels.triton_timing import graph_milliseconds

        with torch.cuda.device(device):  # whose streams and graphs hold the calls
            return graph_milliseconds(calls)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(found) for name, found in times.items()}


def shown(times: Mapping[str, float]) -> str:
    """The times for a sentence, shortest first."""
    return ", ".join(f"{name} {times[name]:.3f} ms" for name in sorted(times, key=times.__getitem__))
