"""Which engine runs a packed conv, and why: the rule behind `backend="auto"` and the checks behind a name.

Beside the engines there are torch's own convs, as "dense", with all weights, and as "compact", on the input channels
and output channels that hold a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels import cpu_cost
from fxdbsr.kernels.compact import why_not_compact

BACKENDS = ("auto", "triton", "cpu", "reference", "dense")
TORCH = ("dense", "compact")  # what torch runs, whatever the device


@dataclass(frozen=True)
class Case:
    """A conv to choose an engine for: its blocks, geometry and epilogue, and what is known of its input.

    Attributes:
        grid, crow_indices, col_indices: the blocks that are kept.
        bias, residual, activation: the epilogue.
        size: of the input, `(N, H, W)`; N is 0 where the batch is not known; None where nothing is.
        precision: "3xtf32" where the Triton engine may form float32 so; see `fxdbsr.set_float32_precision`.
        pool: side of a max pool that alone reads the output, 1 for none.
    """

    grid: BlockGrid
    crow_indices: Tensor
    col_indices: Tensor
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    bias: bool = True
    residual: bool = False
    activation: str = "none"
    size: tuple[int, ...] | None = None
    precision: str | None = None
    pool: int = 1


@dataclass(frozen=True)
class Choice:
    """An engine and why; `form` holds further arguments of the engine's `tables`, plain values."""

    engine: str
    reason: str
    form: dict[str, Any] = field(default_factory=dict)


def as_backend(value: object) -> str:
    """Check that `value` names a backend.

    Raises:
        ValueError: it does not.
    """
    if value not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {value!r}")
    return str(value)


def engine_module(engine: str) -> Any | None:
    """The module of the engine of that name, or None where it is not part of this installation."""
    try:
        return import_module(f"fxdbsr.kernels.{engine}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("fxdbsr"):
            return None
        raise


def why_not(
    engine: str,
    grid: BlockGrid,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """Why `engine` cannot run this conv, as a sentence, or None where it can."""
    if engine in ("reference", *TORCH):
        return None
    module = engine_module(engine)
    if module is None:
        return f"the {engine} engine is not installed"
    if engine == "cpu" and device.type != "cpu":
        return f"the cpu engine needs cpu tensors, the weights are on {device.type}"
    arguments = (grid, stride, padding, dilation, dtype)
    reason: str | None = module.why_not(*arguments, device) if engine == "triton" else module.why_not(*arguments)
    return reason


def why_not_here(engine: str, case: Case) -> str | None:
    """`why_not` for `case`; compact is no candidate where every channel holds a block."""
    if engine == "compact":
        return why_not_compact(case.grid, case.crow_indices, case.col_indices)
    return why_not(engine, case.grid, case.stride, case.padding, case.dilation, case.dtype, case.device)


def choose(backend: str, case: Case) -> Choice:
    """The engine for `case` and why.

    "auto" takes what is expected to be cheapest: on a GPU by the Triton engine's own roofline, which says nothing of
    compact, on a CPU by `cpu_cost`. A name takes that engine where it can run the conv, and dense where it cannot.
    """
    if backend == "dense":
        return Choice("dense", "asked for")
    if backend != "auto":
        reason = why_not_here(backend, case)
        return Choice(backend, "asked for") if reason is None else Choice("dense", reason)
    if case.device.type == "cuda":
        reason = why_not_here("triton", case)
        form, why = (None, reason) if reason is not None else _triton_verdict(case)
        return Choice("dense", why) if form is None else Choice("triton", why, form)
    reasons = {engine: why_not_here(engine, case) for engine in ("cpu", "compact", "dense")}
    cheapest, why = cpu_cost.cheapest([engine for engine, reason in reasons.items() if reason is None], case)
    return Choice(cheapest, "; ".join(part for part in (reasons["cpu"], why) if part))


def candidates(case: Case) -> dict[str, Choice]:
    """What can run `case`, by name: the device's engine in each of its forms, and torch's own."""
    found: dict[str, Choice] = {}
    if case.device.type == "cuda" and case.size and why_not_here("triton", case) is None:
        found |= {f"triton {name}": Choice("triton", "", form) for name, form in _triton_forms(case).items()}
    for engine in ("cpu", *TORCH):
        if why_not_here(engine, case) is None:
            found[engine] = Choice(engine, "")
    return found


def _triton_forms(case: Case) -> dict[str, dict[str, Any]]:
    from fxdbsr.kernels import triton_layer, triton_tune

    return triton_tune.candidates(triton_layer.Layer.of(case), case.device)


def _triton_verdict(case: Case) -> tuple[dict[str, Any] | None, str]:
    from fxdbsr.kernels import triton_roofline

    return triton_roofline.verdict(case)


def check_available(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a backend asked for by name that can run nothing here.

    Raises:
        RuntimeError: the message says why.
    """
    grid = BlockGrid(64, 64, (3, 3), 1, (32, 32))
    reason = why_not(backend, grid, (1, 1), (1, 1), (1, 1), dtype, device) if backend != "auto" else None
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
