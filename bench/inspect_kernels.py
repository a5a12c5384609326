"""Registers, spills, shared memory and instruction mix of every tile of the Triton engine, without a GPU.

    python -m bench.inspect_kernels --target cuda:90 --json

Exits 1 if any tile has a fault for which it would not be shipped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import triton
from tabulate import tabulate

from fxdbsr.kernels.triton_configs import PRECISIONS
from fxdbsr.kernels.triton_offline import DTYPES, GEOMETRIES, TARGETS, Shipped, half_depth, shipped


def entries(target: str, geometries: Sequence[str], precisions: Sequence[str], half: bool) -> Iterator[Shipped]:
    """The tiles asked for; with `half` those for tables of half the depth as well."""
    for entry in shipped(target, tuple(geometries)):
        if entry.precision in precisions:
            yield entry
            shallow = half_depth(entry) if half and entry.kernel == "gather" and entry.lanes > 16 else None
            if shallow is not None:
                yield shallow


def inspect(entry: Shipped, dtype: str) -> dict[str, Any]:
    """What was asked for, and what the compiler made of it."""
    facts, tile = entry.compile(dtype), entry.tile
    return {
        "triton": triton.__version__,
        "target": entry.target,
        "kernel": entry.kernel,
        "geometry": entry.geometry,
        "precision": entry.precision,
        "dtype": dtype,
        "pixels": tile.pixels,
        "outputs": tile.outputs,
        "depth": tile.depth,
        "warps": tile.warps,
        "stages": tile.stages,
        "weights_first": tile.weights_first,
        "copy_bytes": tile.copy,
        "registers": facts.registers,
        "spills": facts.spills,
        "shared_bytes": facts.shared,
        "matrix": facts.matrix,
        "instructions": facts.instructions,
        "loop": dict(facts.mix().most_common()),
        "faults": entry.faults(facts),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: cuda:90")
    parser.add_argument("--geometry", choices=GEOMETRIES, action="append", help="default: 3x3 and 1x1")
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="default: all")
    parser.add_argument("--half", action="store_true", help="tables of half the depth as well")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    records = []
    for target in options.target or ("cuda:90",):
        asked = (options.geometry or ("3x3", "1x1"), options.precision or PRECISIONS, options.half)
        for entry in entries(target, *asked):
            for dtype in DTYPES[entry.precision]:
                records.append(inspect(entry, dtype))
                if options.json:
                    print(json.dumps(records[-1]), flush=True)
    if not options.json:
        shown = [{**r, "loop": sum(r["loop"].values()), "faults": "; ".join(r["faults"])} for r in records]
        print(tabulate(shown, headers="keys"))
    return int(any(record["faults"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
