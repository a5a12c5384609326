"""How long conversion and the first call take: ResNet-50 in fresh processes, with an empty cache and with a full one.

    python -m bench.cpu_start [--json bench/results/cpu_start.json]

Cold: no code of this library has been compiled on the machine. Warm: the cache on disk holds it. Imports, the model's
construction and pruning are not counted; medians over processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torchvision

import fxdbsr
from fxdbsr.commands.spread import spread_mask
from fxdbsr.layers import blocked_layers
from fxdbsr.paired import provenance

ROUNDS = 5


def once() -> dict[str, float]:
    """Seconds of one conversion and of the first call, in this process."""
    torch.manual_seed(0)
    prepared = fxdbsr.prepare(torchvision.models.resnet50(weights=None).eval(), (32, 32))
    generator = torch.Generator().manual_seed(0)
    for layer in blocked_layers(prepared):
        layer.set_mask(spread_mask(layer.grid.shape, 0.5, generator))
    x = torch.randn(1, 3, 224, 224)
    start = time.perf_counter()
    fast = fxdbsr.convert(prepared)
    converted = time.perf_counter()
    with torch.inference_mode():
        fast(x)
    return {"convert": converted - start, "first_call": time.perf_counter() - converted}


def child(cache: str) -> dict[str, float]:
    """`once` in a process of its own."""
    command = [sys.executable, "-m", "bench.cpu_start", "--once"]
    done = subprocess.run(
        command, env={**os.environ, "FXDBSR_CACHE": cache}, capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    """Median of each entry and of their sum."""
    found = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {key: round(value, 3) for key, value in found.items()} | {
        "sum": round(statistics.median(sum(run.values()) for run in runs), 3)
    }


def main() -> None:
    """Measure, print, write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--once", action="store_true", help="measure in this process, with the cache as it is")
    options = parser.parse_args()
    if options.once:
        print(json.dumps(once()))
        return
    cold, warm = [], []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(child(cache))
            warm.append(child(cache))
    result: dict[str, Any] = {"provenance": provenance(), "seconds": {"cold": median(cold), "warm": median(warm)}}
    print(json.dumps(result["seconds"], indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
