"""Which engine runs a packed conv, and why: the rule behind `backend="auto"` and the checks behind a name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fxdbsr.blocks import BlockGrid

BACKENDS = ("auto", "triton", "cpu", "reference", "dense")


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
    if engine in ("reference", "dense"):
        return None
    needed = "cuda" if engine == "triton" else "cpu"
    module = engine_module(engine)
    if module is None:
        return f"the {engine} engine is not installed"
    if engine == "cpu" and device.type != needed:
        return f"the {engine} engine needs {needed} tensors, the weights are on {device.type}"
    arguments = (grid, stride, padding, dilation, dtype)
    reason: str | None = module.why_not(*arguments, device) if engine == "triton" else module.why_not(*arguments)
    return reason


def choose(
    backend: str,
    density: float,
    grid: BlockGrid,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    indices: tuple[Tensor, Tensor] | None = None,
    **seen: Any,
) -> tuple[str, str]:
    """(engine, reason) for a conv that keeps `density` of its blocks.

    "auto" takes the device's engine where it can run the conv and that pays: on a GPU by the roofline of
    `triton.verdict`, on the CPU where the blocks are few enough. A name takes that engine where it can run the
    conv, and dense where it cannot.

    Args:
        indices: `crow_indices`, `col_indices` of the blocks that are kept.
        seen: what is known of the calls, as `triton.verdict` names it.
    """
    if backend == "dense":
        return "dense", "asked for"
    if backend != "auto":
        reason = why_not(backend, grid, stride, padding, dilation, dtype, device)
        return (backend, "asked for") if reason is None else ("dense", reason)
    engine = "triton" if device.type == "cuda" else "cpu"
    reason = why_not(engine, grid, stride, padding, dilation, dtype, device)
    if reason is not None:
        return "dense", reason
    if engine == "triton" and indices is not None:
        module = engine_module(engine)
        assert module is not None
        pays, reason = module.verdict(grid, *indices, stride, padding, dilation, dtype, device, **seen)
        return engine if pays else "dense", reason
    limit = density_limit(engine, grid)
    comparison = "at most" if density <= limit else "above"
    return (
        engine if density <= limit else "dense",
        f"density {density:.2f} is {comparison} {limit:.2f}, up to which the {engine} engine is expected to be faster",
    )


def density_limit(engine: str, grid: BlockGrid) -> float:
    """Density up to which `engine` is expected to beat torch's own conv, by the height of the blocks.

    Torch's own conv packs its weights at every call: ResNet-50 with all blocks of 32x32 kept is faster on the CPU
    engine than in eager torch (bench/results/cpu_resnet50_float32.jsonl). The limit for lower blocks and those of
    the Triton engine are estimates.
    """
    if engine == "cpu":
        return 1.0 if grid.block_size[0] >= 16 else 0.8
    return 0.8 if grid.block_size[0] >= 16 else 0.6


def check_available(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a backend asked for by name that can run nothing here.

    Raises:
        RuntimeError: the message says why.
    """
    grid = BlockGrid(64, 64, (3, 3), 1, (32, 32))
    reason = why_not(backend, grid, (1, 1), (1, 1), (1, 1), dtype, device) if backend != "auto" else None
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
