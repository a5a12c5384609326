"""Side-by-side timing: interleaved pairs, their median ratio and quartiles, and what every result file states."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision


@dataclass(frozen=True)
class Ratio:
    """Time of a base over time of an arm, from pairs in the order base, arm, arm, base.

    Attributes:
        median, low, high: median and quartiles of the ratio; above 1 the arm is faster.
        base_ms, arm_ms: median milliseconds of a call.
        pairs: number of pairs.
    """

    median: float
    low: float
    high: float
    base_ms: float
    arm_ms: float
    pairs: int


def paired(base: Callable[[], Any], arm: Callable[[], Any], pairs: int = 20, warm_up: int = 2) -> Ratio:
    """Time `base` and `arm` against each other."""
    for _ in range(warm_up):
        base()
        arm()
    ratios, base_times, arm_times = [], [], []
    for _ in range(pairs):
        first, second, third, fourth = (seconds(call) for call in (base, arm, arm, base))
        ratios.append((first + fourth) / (second + third))
        base_times += [first, fourth]
        arm_times += [second, third]
    low, median, high = quantiles(ratios)
    return Ratio(median, low, high, 1e3 * quantiles(base_times)[1], 1e3 * quantiles(arm_times)[1], pairs)


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    low, median, high = found.tolist()
    return low, median, high


def provenance() -> dict[str, Any]:
    """Commit, processor, threads and versions, for the result's file."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip() + ("+" if dirty.stdout.strip() else ""),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """The processor's name as the system states it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSON lines: the provenance first, then the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in (provenance(), *rows)))


def as_row(ratio: Ratio) -> dict[str, Any]:
    """`ratio` with its figures rounded for a file."""
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(ratio).items()}
