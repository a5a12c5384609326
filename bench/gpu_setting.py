"""What every part of bench/gpu.py shares: cases, the device, timing, and the file of records.

A case has a key that identifies it in the file, an estimate that needs no GPU, and a measurement that does. A record is
one JSON object on a line; `measured` is true where its figures were taken on a GPU in the run that wrote it.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxdbsr.kernels.triton_timing import captured, replayed_in_turns
from fxdbsr.paired import quantiles

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
BLOCKS = {"32x32": (32, 32), "64x16": (64, 16), "64x32": (64, 32), "128x32": (128, 32)}


@dataclass(frozen=True)
class Setting:
    """Where the measuring code runs.

    Args:
        rehearse: on the CPU, kernels interpreted, everything small, nothing timed: shows that the code runs.
        repeats: runs of a kernel that must agree bit for bit; 50 times as many where compilers are known to err.
        seconds: of a timed comparison.
        stop: `time.monotonic()` at which the whole call should be over.
        tuning: seconds that torch.compile's max-autotune may take; 0: its default mode alone.
    """

    rehearse: bool = False
    repeats: int = 20
    seconds: float = 0.3
    stop: float = math.inf
    tuning: float = 240

    def left(self) -> float:
        """Seconds until the whole call should be over."""
        return self.stop - time.monotonic()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    def times(self, functions: Mapping[str, Callable[[], Any]], base: str, calls: int = 10) -> dict[str, Any]:
        """Microseconds of each function and how many times faster than `base` it is, all replayed in turns.

        Medians with quartiles over rounds; a ratio is the median of the rounds' ratios. None in a rehearsal. A function
        that cannot be captured is left out, and "no <name>" says why; the first that can stands in for such a base.
        """
        if self.rehearse:
            for function in functions.values():
                function()
            return {f"us {name}": None for name in functions}
        graphs, found = {}, dict[str, Any]()
        for name, function in functions.items():
            try:
                graphs[name] = captured(function, calls)
            except Exception as error:
                torch.cuda.synchronize()  # raises where the GPU was lost
                found[f"no {name}"] = f"{type(error).__name__}: {str(error)[-300:]}"
        if not graphs:
            raise RuntimeError(f"nothing could be timed: {found}")
        base = base if base in graphs else next(iter(graphs))
        samples = replayed_in_turns(graphs, self.seconds, calls)
        for name, values in samples.items():
            found[f"us {name}"] = [round(1e3 * value, 3) for value in quantiles(values)]
            if name != base:
                rounds = [a / b for a, b in zip(samples[base], values, strict=True)]
                found[f"{name} over {base}"] = [round(value, 4) for value in quantiles(rounds)]
        return found


@dataclass(frozen=True)
class Case:
    """One line of the file.

    Args:
        key: what identifies it.
        estimate: what can be said without a GPU.
        measure: what a GPU says; None where there is nothing to measure.
    """

    key: dict[str, Any]
    estimate: Callable[[], dict[str, Any]]
    measure: Callable[[Setting], dict[str, Any]] | None


def set_precision(dtype: str) -> None:
    """Let float32 use tf32 only where `dtype` says so, in cuDNN, cuBLAS and the engine alike.

    By the older switches, which the newer ones follow. The other way round, torch.get_float32_matmul_precision raises,
    and max-autotune with it.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"


@contextmanager
def by_heuristics() -> Iterator[None]:
    """No measuring of cuDNN's kernels inside, which for references in float64 takes long."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def machine() -> dict[str, Any]:
    """Where and with what the figures are made."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    commit = commit or os.environ.get("COMMIT", "")  # a machine for measuring may have no git
    cuda = torch.cuda.is_available()
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    found = {
        "device": torch.cuda.get_device_name() if cuda else f"none ({platform.machine()})",
        "commit": commit,
        "torch": torch.__version__,
        "triton": version,
    }
    return found | {"cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda} if cuda else found


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a line that a killed process left torn is passed over, and ended."""
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        with path.open("a") as file:
            file.write("\n")
    found = []
    for line in text.splitlines():
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


class Records:
    """The records of a file by key; new ones are appended at once. A case that lost the GPU is done as well."""

    def __init__(self, path: Path, measured: bool) -> None:
        self.path, self.measured, self.where = path, measured, machine()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.all = whole_lines(path)
        self.done = {
            json.dumps(r["key"], sort_keys=True)
            for r in self.all
            if r["measured"] == measured and r["device"] == self.where["device"]
        }

    def has(self, case: Case) -> bool:
        """True where the file holds the case, made on a device of this kind."""
        return json.dumps(case.key, sort_keys=True) in self.done

    def add(self, case: Case, found: dict[str, Any]) -> dict[str, Any]:
        """Append a record and return it."""
        record = {"key": case.key, "measured": self.measured, **self.where, **found}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.all.append(record)
        self.done.add(json.dumps(case.key, sort_keys=True))
        return record
