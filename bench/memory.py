"""Does a process grow? 1,000 conversions and 10,000 inferences, resident memory before and after.

    python -m bench.memory [--json bench/results/memory.json]

The resident set is read after a tenth of the rounds, which fill the caches, after four and seven tenths, and at the
end, each time when the allocator has given back what it holds free. The inferences
are of 14 sizes in turn and now and then of another, more than a model keeps plans for; the conversions are of one
model, in turn with every backend, each run once.
"""

from __future__ import annotations

import argparse
import ctypes
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
from bench.small_net import SmallNet, sparse
from fxdbsr.paired import provenance

trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
BACKENDS = ("auto", "reference", "dense")


def resident() -> float:
    """MiB of this process in memory, without what the allocator holds free."""
    gc.collect()
    if trim is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(step: Callable[[int], object], rounds: int) -> list[float]:
    """MiB after one, four, seven and ten tenths of `rounds` calls of `step`."""
    found = []
    for n in range(1, rounds + 1):
        step(n)
        if n * 10 // rounds in (1, 4, 7, 10) and n * 10 % rounds < 10:
            found.append(round(resident(), 2))
    return found


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
        fast(torch.randn(1 + n % 2, 3, size + n % 7 if n % 50 else size + n // 50 % 24, size))

    rows: list[dict[str, object]] = []
    for what, step, rounds in (("conversions", convert, conversions), ("inferences", infer, inferences)):
        if rounds:
            mib = growth(step, rounds)
            grown = round(mib[-1] - mib[0], 2)
            rows.append({"model": name, "what": what, "rounds": rounds, "mib": mib, "grown_mib": grown})
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
        rows += measure("resnet18", 32, arguments.conversions // 20, arguments.inferences // 20)
    print(tabulate(rows, headers="keys"))
    if arguments.json:
        arguments.json.write_text(json.dumps({"about": provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
