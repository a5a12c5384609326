"""Fit the costs of `kernels/triton_measured.py` to what was measured on an H100.

    python -m bench.gpu_fit [--fit]

Prints how far the committed costs are off the times in `gpu_tiles.jsonl` and `gpu_rounds.jsonl`, tile by tile; with
--fit those that a least-squares fit of their logarithms gives today (it needs scipy).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, exp, log
from statistics import fmean
from typing import Any

from tabulate import tabulate

from bench.gpu_convs import convs_alone
from bench.gpu_setting import BLOCKS, DTYPES, set_precision
from bench.tables_text import RESULTS
from fxdbsr.kernels.triton_configs import Tile
from fxdbsr.kernels.triton_device import H100
from fxdbsr.kernels.triton_forms import Form, Work, work
from fxdbsr.kernels.triton_layer import Layer
from fxdbsr.kernels.triton_measured import (
    BANDWIDTH,
    COSTS,
    LAUNCH,
    MEMORY_ORDER,
    Cost,
    clocks,
    norm,
    work_clocks,
)

Key = tuple[str, int, int, int, int]  # precision, pixels, outputs, warps, stages


@dataclass(frozen=True)
class Sample:
    """One conv on one tile, and how long it took."""

    layer: Layer
    work: Work
    tile: Tile
    precision: str
    microseconds: float

    @property
    def key(self) -> Key:
        return self.precision, self.tile.pixels, self.tile.outputs, self.tile.warps, self.tile.stages

    def predicted(self, cost: Cost) -> float:
        """Microseconds by a cost."""
        each = self.work.lanes // self.tile.outputs * ceil(self.layer.pixels / self.tile.pixels)
        sizes = (each * self.work.unions, each * self.work.steps)
        epilogue = (self.layer.residual, self.layer.activation)
        total = work_clocks(cost, self.tile, self.precision, *sizes, *epilogue)
        ended = clocks(cost, self.tile, self.precision, total, self.work.longest, H100.processors)
        memory = self.layer.bytes(self.layer.residual) / H100.bandwidth
        return 1e6 * (LAUNCH + norm(ended / H100.clock, memory / BANDWIDTH, MEMORY_ORDER))


def samples() -> list[Sample]:
    """Every time of a tile that has a cost: of 16 bits with launches that overlap, of float32 from the second round."""
    found = []
    for record in _records():
        key = record["key"]
        set_precision(key["dtype"])
        conv = next(conv for conv in convs_alone(key["model"]) if conv.name == key["layer"])
        layer = conv.layer(key["batch"], DTYPES[key["dtype"]], BLOCKS[key["block"]], 1 - key["sparsity"] / 100)
        for label, microseconds in record["us"].items():
            parsed = _parsed(label, key)
            if microseconds is None or parsed is None:
                continue
            form, tile = parsed
            done = work(layer.grid, layer.columns, form, layer.dtype.itemsize)
            sample = Sample(layer, done, tile, form.precision, microseconds)
            narrower = tile.outputs < min(done.lanes, 32 if form.precision == "3xtf32" else done.lanes)
            if sample.key in COSTS and tile.depth == done.depth and not narrower:
                found.append(sample)
    return found


def _records() -> Iterator[dict[str, Any]]:
    for name in ("gpu_tiles.jsonl", "gpu_rounds.jsonl"):
        for record in map(json.loads, (RESULTS / name).read_text().splitlines()):
            key = record["key"]
            tiles = key["part"] == "tiles" and "us" in record
            if key["part"] == "overlap" or (tiles and (key["model"] == "vgg11" or key["round"] == 2)):
                yield record


def _parsed(label: str, key: Mapping[str, Any]) -> tuple[Form, Tile] | None:
    """Form and tile of a label; None for cuDNN, splits, narrow copies and launches that do not overlap."""
    if key["part"] == "overlap":
        if not label.endswith(" O0"):
            return None
        label, rows = label.removesuffix(" O0"), key["rows"]
    else:
        parts = label.split(", ")
        rows = next((int(part.split()[0]) for part in parts if part.endswith("rows")), 1)
    *words, shape = label.split(", ")
    if "x" not in shape or "/" in shape or " b" in shape:
        return None
    dims, warps, stages, *first = shape.split()
    pixels, outputs, depth = map(int, dims.split("x"))
    precision = "3xtf32" if "3xTF32" in words else "16" if key["dtype"] == "fp16" else "ieee"
    form = Form("gather", rows, precision)
    return form, Tile(pixels, outputs, depth, int(warps[1:]), int(stages[1:]), first != ["p"])


def errors(found: Sequence[Sample], costs: Mapping[Key, Cost] = COSTS) -> dict[Key, list[float]]:
    """Logarithms of predicted over measured, by tile."""
    off: dict[Key, list[float]] = {}
    for sample in found:
        off.setdefault(sample.key, []).append(log(sample.predicted(costs[sample.key]) / sample.microseconds))
    return off


def root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(fmean(value**2 for value in values))


def fitted(found: Sequence[Sample], start: Cost) -> Cost:
    """The cost for which the samples of a tile are predicted best."""
    from scipy.optimize import least_squares

    def residuals(logs: Sequence[float]) -> list[float]:
        cost = Cost(*map(exp, logs))
        return [log(sample.predicted(cost) / sample.microseconds) for sample in found]

    best: Callable[..., Any] = least_squares
    logs = best(residuals, [log(v) for v in (start.fixed, start.step, start.latency)], loss="soft_l1", f_scale=0.1).x
    return Cost(*(float(f"{exp(value):.3g}") for value in logs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args()
    found = samples()
    rows = []
    for key, off in errors(found).items():
        of = [sample for sample in found if sample.key == key]
        cost = fitted(of, COSTS[key]) if options.fit else COSTS[key]
        rows.append([*key, len(off), cost.fixed, cost.step, cost.latency, fmean(off), root_mean_square(off)])
    heads = ["precision", "pixels", "outputs", "warps", "stages", "times", "fixed", "step", "latency"]
    print(tabulate(rows, [*heads, "mean error", "rms error"], floatfmt=".3g"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
