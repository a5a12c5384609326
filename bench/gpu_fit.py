"""Fit the costs of `kernels/triton_measured.py` to what was measured.

    python -m bench.gpu_fit [--fit]

Prints how far the committed costs are off the times of an H100 in `gpu_tiles.jsonl` and `gpu_rounds.jsonl`, and of an
H200 in `gpu.jsonl` (parts `layers`, `candidates`, `hand`), tile by tile; with --fit those that least squares of their
logarithms give today (it needs scipy): to both GPUs, then from there to the H200. Times in which some multiprocessors
have much more to do than others say less of a tile and do not count.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, exp, log, prod
from statistics import fmean
from typing import Any

from tabulate import tabulate

from bench.gpu_convs import Conv, convs, convs_alone
from bench.gpu_hand import HAND, MORE, layer_of
from bench.gpu_setting import BLOCKS, DTYPES, set_precision
from bench.tables_text import RESULTS
from fxdbsr.kernels.triton_configs import Tile, tiles
from fxdbsr.kernels.triton_device import H100, H200, Device
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
    resident,
)

NEAR, EVEN = 0.1, 1.2
LABEL = re.compile(r"us gather(?:, (\d) rows)?, (\d+)x(\d+) w(\d+) s(\d+)")
Key = tuple[str, int, int, int, int]  # precision, pixels, outputs, warps, stages


@dataclass(frozen=True)
class Sample:
    """One conv on one tile, and how long it took."""

    layer: Layer
    work: Work
    tile: Tile
    precision: str
    microseconds: float
    device: Device

    @property
    def key(self) -> Key:
        return self.precision, self.tile.pixels, self.tile.outputs, self.tile.warps, self.tile.stages

    @property
    def each(self) -> int:
        """Programs of each union."""
        return self.work.lanes // self.tile.outputs * ceil(self.layer.pixels / self.tile.pixels)

    @property
    def even(self) -> bool:
        """True unless all run at once and the busiest multiprocessor has more than EVEN times the average.

        In float32, of which there are few times, always true.
        """
        programs = self.each * self.work.unions / self.device.processors
        return (
            self.precision != "16"
            or not 1 < programs <= resident(self.tile, self.precision)
            or ceil(programs) / programs <= EVEN
        )

    def predicted(self, cost: Cost) -> float:
        """Microseconds by a cost."""
        load = self.work.load(self.each, 1, self.layer.residual, self.layer.activation)
        ended = clocks(cost, self.tile, self.precision, load, self.device.processors)
        memory = self.layer.bytes(self.layer.residual, self.layer.pool) / self.device.bandwidth
        return 1e6 * (LAUNCH + norm(ended / self.device.clock, memory / BANDWIDTH, MEMORY_ORDER))


def samples() -> list[Sample]:
    """Every time of a tile that has a cost."""
    return [sample for sample in (*_of_an_h100(), *_of_an_h200()) if sample.key in COSTS]


def _of_an_h100() -> Iterator[Sample]:
    """16 bits with launches that overlap, float32 from the second round."""
    for record in _records():
        key = record["key"]
        layer = _layer(key, convs_alone)
        for label, microseconds in record["us"].items():
            parsed = _of_a_round(label, key)
            if microseconds is None or parsed is None:
                continue
            form, tile = parsed
            done = work(layer.grid, layer.columns, form, layer.dtype.itemsize)
            narrower = tile.outputs < min(done.lanes, 32 if form.precision == "3xtf32" else done.lanes)
            if tile.depth == done.depth and not narrower:
                yield Sample(layer, done, tile, form.precision, microseconds, H100)


def _of_an_h200() -> Iterator[Sample]:
    """The planner's tiles on whole layers, sparse and dense, and every tile on some and on those worked by hand."""
    rows = {row[0]: row for row in (*HAND, *MORE)}
    for record in map(json.loads, (RESULTS / "gpu.jsonl").read_text().splitlines()):
        key = record["key"]
        if key["part"] == "layers" and "tile" in record:
            layer = _layer(key, convs)
            yield _sample(layer, *_parsed(f"{record['form']}, {record['tile']}", key), record["us sparse"][1])
            form, tile = _parsed(f"{record['dense form']}, {record['dense tile']}", key)
            if form.rows == 1 or not layer.residual:  # else rows of a tile lay apart when it was measured (round 9)
                yield _sample(layer.full(), form, tile, record["us dense Triton"][1])
        elif key["part"] == "candidates":
            yield from _of_forms(_layer(key, convs), record)
        elif key["part"] == "hand" and min(rows[key["layer"]][6]) >= 16:  # 8x8: its steps are of several columns
            set_precision(key["dtype"])
            yield from _of_forms(layer_of(rows[key["layer"]]), record)


def _of_forms(layer: Layer, record: Mapping[str, Any]) -> Iterator[Sample]:
    for form, tile, microseconds in timed_tiles(layer, record):
        yield _sample(layer, form, tile, microseconds)


def timed_tiles(layer: Layer, record: Mapping[str, Any]) -> Iterator[tuple[Form, Tile, float]]:
    """Forms, tiles and microseconds of a record of `bench.gpu_layers.measure_forms`; its precision must be set."""
    for label, said in record.items():
        parsed = LABEL.fullmatch(label)
        if parsed is not None:
            form = Form("gather", int(parsed[1] or 1), layer.precision)
            done = work(layer.grid, layer.columns, form, layer.dtype.itemsize)
            listed = tiles("cuda:90", form.precision, done.lanes, done.depth, prod(layer.grid.kernel_size))
            shape = tuple(map(int, parsed.groups()[1:]))
            yield form, next(t for t in listed if (t.pixels, t.outputs, t.warps, t.stages) == shape), said[1]


def _layer(key: Mapping[str, Any], listed: Callable[[str], Mapping[Conv, int]]) -> Layer:
    set_precision(key["dtype"])
    conv = next(conv for conv in listed(key["model"]) if conv.name == key["layer"])
    return conv.layer(key["batch"], DTYPES[key["dtype"]], BLOCKS[key["block"]], 1 - key["sparsity"] / 100)


def _sample(layer: Layer, form: Form, tile: Tile, microseconds: float) -> Sample:
    done = work(layer.grid, layer.columns, form, layer.dtype.itemsize)
    return Sample(layer, done, tile, form.precision, microseconds, H200)


def _records() -> Iterator[dict[str, Any]]:
    for name in ("gpu_tiles.jsonl", "gpu_rounds.jsonl"):
        for record in map(json.loads, (RESULTS / name).read_text().splitlines()):
            key = record["key"]
            tiles = key["part"] == "tiles" and "us" in record
            if key["part"] == "overlap" or (tiles and (key["model"] == "vgg11" or key["round"] == 2)):
                yield record


def _of_a_round(label: str, key: Mapping[str, Any]) -> tuple[Form, Tile] | None:
    """Form and tile of a label; None for cuDNN, splits, narrow copies and launches that do not overlap."""
    if key["part"] == "overlap":
        if not label.endswith(" O0"):
            return None
        label = f"gather, {key['rows']} rows, {label.removesuffix(' O0')}"
    shape = label.split(", ")[-1]
    if "x" not in shape or "/" in shape or " b" in shape:
        return None
    return _parsed(label, key)


def _parsed(label: str, key: Mapping[str, Any]) -> tuple[Form, Tile]:
    """Form and tile of "gather, 2 rows, 64x64x64 w4 s2"."""
    *words, shape = label.split(", ")
    rows = next((int(word.split()[0]) for word in words if word.endswith("rows")), 1)
    dims, warps, stages, *first = shape.split()
    pixels, outputs, depth = map(int, dims.split("x"))
    precision = "3xtf32" if "3xTF32" in words else "16" if key["dtype"] == "fp16" else "ieee"
    tile = Tile(pixels, outputs, depth, int(warps[1:]), int(stages[1:]), first != ["p"])
    return Form("gather", rows, precision), tile


def errors(found: Sequence[Sample], costs: Mapping[Key, Cost] = COSTS) -> dict[Key, list[float]]:
    """Logarithms of predicted over measured, by tile."""
    off: dict[Key, list[float]] = {}
    for sample in found:
        off.setdefault(sample.key, []).append(log(sample.predicted(costs[sample.key]) / sample.microseconds))
    return off


def root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(fmean(value**2 for value in values))


def fitted(found: Sequence[Sample], start: Cost) -> Cost:
    """The cost for which the times of a tile on an H200 are predicted best, where these are few near that of both."""
    full = [sample for sample in found if sample.even]
    both = _fitted(full, _logs(start), 0)
    logs = _fitted([sample for sample in full if sample.device is H200], both, NEAR)
    return Cost(*(float(f"{exp(value):.3g}") for value in logs))


def _fitted(found: Sequence[Sample], start: Sequence[float], near: float) -> list[float]:
    """Logarithms of a cost; by how far each is from the start counts `near` times."""
    from scipy.optimize import least_squares

    def residuals(logs: Sequence[float]) -> list[float]:
        cost = Cost(*map(exp, logs))
        off = [log(sample.predicted(cost) / sample.microseconds) for sample in found]
        return off + [near * (one - other) for one, other in zip(logs, start, strict=True)]

    best: Callable[..., Any] = least_squares
    return [float(value) for value in best(residuals, start, loss="soft_l1", f_scale=0.1).x]


def _logs(cost: Cost) -> list[float]:
    return [log(cost.fixed), log(cost.step), log(cost.latency)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args()
    found = samples()
    rows = []
    for key, start in COSTS.items():
        of = [sample for sample in found if sample.key == key]
        cost = fitted(of, start) if options.fit else start
        row: list[Any] = [*key, cost.fixed, cost.step, cost.latency]
        for device in (H100, H200):
            off = errors([sample for sample in of if sample.device is device], {key: cost}).get(key, [])
            row += [len(off), fmean(off), root_mean_square(off)] if off else [0, None, None]
        rows.append(row)
    heads = ["precision", "pixels", "outputs", "warps", "stages", "fixed", "step", "latency"]
    of_each = [f"{gpu}: {said}" for gpu in ("H100", "H200") for said in ("times", "mean error", "rms error")]
    print(tabulate(rows, [*heads, *of_each], floatfmt=".3g"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
