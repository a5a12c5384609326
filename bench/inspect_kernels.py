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

from tabulate import tabulate

from fxdbsr.kernels.triton_offline import GEOMETRIES, TARGETS, compile_gather, faults
from fxdbsr.kernels.triton_plan import CONFIGS, PRECISIONS, adapt

DTYPES = {"16": ("fp16", "bf16"), "tf32": ("fp32",), "ieee": ("fp32",), "3xtf32": ("fp32",)}


def inspect(target: str, geometries: Sequence[str], precisions: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One record a tile, dtype and geometry: what was asked for, and what the compiler made of it."""
    for (precision, _), tiles in CONFIGS.items():
        if precision not in precisions or (precision == "3xtf32" and target.startswith("hip")):
            continue
        for geometry in geometries:
            taps = GEOMETRIES[geometry]["R"] * GEOMETRIES[geometry]["S"]
            for tile in dict.fromkeys(adapt(tile, tile.depth, taps, target) for tile in tiles):
                for dtype in DTYPES[precision]:
                    facts = compile_gather(tile, precision, dtype, geometry, target)
                    yield {
                        "target": target,
                        "geometry": geometry,
                        "precision": precision,
                        "dtype": dtype,
                        "pixels": tile.pixels,
                        "outputs": tile.outputs,
                        "depth": tile.depth,
                        "warps": tile.warps,
                        "stages": tile.stages,
                        "weights_first": tile.weights_first,
                        "registers": facts.registers,
                        "spills": facts.spills,
                        "shared_bytes": facts.shared,
                        "matrix_instructions": facts.matrix,
                        "instructions": facts.instructions,
                        "loop": dict(facts.mix().most_common()),
                        "faults": faults(facts, precision),
                    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, default="cuda:90")
    parser.add_argument("--geometry", choices=GEOMETRIES, action="append", help="default: 3x3 and 1x1")
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="default: all")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    records = []
    for record in inspect(options.target, options.geometry or ("3x3", "1x1"), options.precision or PRECISIONS):
        records.append(record)
        if options.json:
            print(json.dumps(record), flush=True)
    if not options.json:
        shown = [{**r, "loop": sum(r["loop"].values()), "faults": "; ".join(r["faults"])} for r in records]
        print(tabulate(shown, headers="keys"))
    return int(any(record["faults"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
