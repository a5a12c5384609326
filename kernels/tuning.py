"""What was measured before: for a device, versions, geometry, dtype and density, the fastest candidate's name.

One JSON file each in the folder of `fxdbsr.kernels.cache`, written whole or not at all. A file says only which of
the present candidates to take; what is damaged or about something else is measured again, and one warning says so.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from fxdbsr.kernels import cache, jit

if TYPE_CHECKING:
    from fxdbsr.kernels.choice import Case

FORMAT = 1


def key_of(case: Case, threads: int) -> dict[str, Any]:
    """What a measurement on `case` depends on, in plain types."""
    grid = case.grid
    return {
        "format": FORMAT,
        "device": device_name(case.device),
        "threads": threads if case.device.type == "cpu" else 0,
        "versions": {"torch": torch.__version__} | {name: _version(name) for name in ("fxdbsr", "triton", "llvmlite")},
        "grid": [grid.out_channels, grid.in_channels, *grid.kernel_size, grid.groups, *grid.block_size],
        "geometry": [list(case.stride), list(case.padding), list(case.dilation)],
        "size": list(case.size or ()),
        "epilogue": [case.bias, case.residual, case.activation, case.pool],
        "dtype": str(case.dtype),
        "precision": [case.precision, torch.backends.cudnn.conv.fp32_precision],  # type: ignore[attr-defined]
        "blocks": len(case.col_indices),
        "rows": int((case.crow_indices.diff() > 0).sum()),
        "columns": len(case.col_indices.unique()),
    }


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU as the code compiled for it knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        target = jit.host()
    except ImportError:
        target = None
    if target is None:
        return platform.machine()
    return f"{target.cpu} {hashlib.sha256(repr(target).encode()).hexdigest()[:8]}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def file_of(key: Mapping[str, Any]) -> str:
    """Name of the file for `key`."""
    return f"tuning-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.json"


def recall(key: Mapping[str, Any]) -> tuple[str, dict[str, float]] | None:
    """The fastest candidate's name and all candidates' milliseconds, or None where nothing of use is kept."""
    name = file_of(key)
    content = cache.read_plain(name)
    if content is None:
        return None
    try:
        found = json.loads(content)
        if found["key"] != key:
            raise ValueError(f"{name} is about another conv")
        times = {str(candidate): float(time) for candidate, time in found["milliseconds"].items()}
        return min(times, key=times.__getitem__), times
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        cache.warn_damaged(name)
        return None


def keep(key: Mapping[str, Any], milliseconds: Mapping[str, float]) -> None:
    """Keep what was measured, where there is a folder for it."""
    entry = {"key": key, "milliseconds": dict(milliseconds)}
    cache.write_plain(file_of(key), json.dumps(entry, sort_keys=True, indent=1).encode())
