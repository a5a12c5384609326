"""Does a process grow? 1,000 conversions and 10,000 inferences, resident memory before and after.

    python -m bench.memory [--json bench/results/memory.json]

After a tenth of the rounds, which fill the caches, the resident set is read, and again at the end. The inferences
are of 40 sizes in turn; the conversions are of one model, in turn with every backend, each run once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate

import fxdbsr
from bench.coverage import build
from bench.paired import provenance
from bench.small_net import SmallNet, sparse

BACKENDS = ("auto", "reference", "dense")


def resident() -> float:
    """MiB of this process in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(step: Callable[[int], object], rounds: int) -> tuple[float, float]:
    """MiB after a tenth of `rounds` calls of `step`, and after all of them."""
    for n in range(rounds // 10):
        step(n)
    before = resident()
    for n in range(rounds // 10, rounds):
        step(n)
    return before, resident()


@torch.no_grad()
def measure(name: str, size: int, conversions: int, inferences: int) -> list[dict[str, object]]:
    """The growth of conversions and of inferences of one model."""
    torch.manual_seed(0)
    model = SmallNet() if name == "small" else build(name).eval()
    x = torch.randn(2, 3, size, size)
    prepared = sparse(model, x, 8 if name == "small" else 32)
    fast = fxdbsr.convert(prepared)

    def convert(n: int) -> None:
        fxdbsr.convert(prepared, backend=BACKENDS[n % len(BACKENDS)])(x)

    def infer(n: int) -> None:
        fast(torch.randn(1 + n % 4, 3, size + n % 10, size))

    rows: list[dict[str, object]] = []
    for what, step, rounds in (("conversions", convert, conversions), ("inferences", infer, inferences)):
        if rounds:
            before, after = growth(step, rounds)
            rows.append({"model": name, "what": what, "rounds": rounds, "before_mib": round(before, 2)})
            rows[-1] |= {"after_mib": round(after, 2), "grown_mib": round(after - before, 2)}
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--conversions", type=int, default=1000)
    parser.add_argument("--inferences", type=int, default=10000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FXDBSR_CACHE"] = folder
        rows = measure("small", 12, arguments.conversions, arguments.inferences)
        rows += measure("resnet18", 32, arguments.conversions // 10, arguments.inferences // 10)
    print(tabulate(rows, headers="keys"))
    if arguments.json:
        arguments.json.write_text(json.dumps({"about": provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
