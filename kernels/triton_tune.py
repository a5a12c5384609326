"""Choose a layer's kernel by measuring it, at conversion, after its numbers are checked against float64.

The forms: the gather kernel with 1, 2 or 4 rows of blocks to a union, the bitmask kernel, and, where allowed,
3xTF32 for ieee float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels import triton as engine
from fxdbsr.kernels.triton_plan import precision_of

Timer = Callable[[Mapping[str, Callable[[], Tensor]]], dict[str, float]]


def forms(grid: BlockGrid, dtype: torch.dtype, allow_3xtf32: bool = False) -> dict[str, dict[str, Any]]:
    """Keyword arguments of `triton.tables` for every form that can run the conv, by name."""
    height = min(grid.block_size[0], grid.out_channels // grid.groups)
    found: dict[str, dict[str, Any]] = {
        f"{size} rows": {"rows_per_union": size} for size in (1, 2, 4) if size == 1 or size * height <= 128
    }
    if engine.why_not_bitmask(grid, dtype) is None:
        found["bitmask"] = {"kernel": "bitmask"}
    if allow_3xtf32 and precision_of(dtype) == "ieee":
        found["3xtf32"] = {"precision": "3xtf32"}
    return found


def graph_milliseconds(
    functions: Mapping[str, Callable[[], Tensor]], seconds: float = 0.2, calls: int = 10
) -> dict[str, float]:
    """Median milliseconds of a call of each function, replayed as CUDA graphs in turns for `seconds`."""
    graphs = {}
    for name, function in functions.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for _ in range(calls):
                function()
    measured: dict[str, list[float]] = {name: [] for name in graphs}
    stop = time.monotonic() + seconds
    while time.monotonic() < stop or len(next(iter(measured.values()))) < 5:
        for name, graph in graphs.items():
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            measured[name].append(start.elapsed_time(end) / calls)
    return {name: sorted(values)[len(values) // 2] for name, values in measured.items()}


def wrong(y: Tensor, exact: Tensor, eager: Tensor) -> str | None:
    """A sentence that says how far `y` is off where its error is over twice eager's and an ulp; else None."""
    allowed = 2 * (eager - exact).abs().max() + torch.finfo(y.dtype).eps * exact.abs().max()
    error = (y - exact).abs().max()
    if error <= allowed:  # false for NaN
        return None
    return f"error {error:.3g} against float64, {allowed:.3g} allowed"


def tune(
    grid: BlockGrid,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    example: Tensor,
    allow_3xtf32: bool = False,
    repeats: int = 100,
    timer: Timer = graph_milliseconds,
) -> tuple[list[Tensor], dict[str, float | str]]:
    """Tables of the fastest form that gives right numbers, and what was found of each.

    Args:
        example: input `[N, I, H, W]` of the size that matters, on the device.
        repeats: runs of a form that must agree bit for bit before it is timed.
        timer: milliseconds of each of some functions.

    Returns:
        The tables, and for each form its milliseconds, or the sentence for which it is out of the race.

    Raises:
        RuntimeError: no form gives right numbers.
    """
    geometry = (stride, padding, dilation)
    packed = (values, crow_indices, col_indices)
    weight = grid.unpack(*packed)
    image = example[:1]
    exact = F.conv2d(image.double(), weight.double(), None, *geometry, grid.groups)
    eager = F.conv2d(image, weight, None, *geometry, grid.groups)
    found: dict[str, float | str] = {}
    made: dict[str, list[Tensor]] = {}
    runs: dict[str, Callable[[], Tensor]] = {}
    for name, form in forms(grid, values.dtype, allow_3xtf32).items():
        tables = engine.tables(grid, *packed, *geometry, **form)

        def run(tables: list[Tensor] = tables) -> Tensor:
            sizes = (grid.in_channels, grid.out_channels)
            return engine.conv(example, *packed, None, None, tables, *sizes, *geometry, grid.groups, "none", 0.0)

        first = run()
        reason = wrong(first[:1], exact, eager)
        if reason is None and not all(torch.equal(run(), first) for _ in range(repeats)):
            reason = "two runs differ"
        if reason is not None:
            found[name] = reason
            continue
        runs[name], made[name] = run, tables
    if not runs:
        raise RuntimeError(f"no form of the Triton engine gives right numbers: {found}")
    milliseconds = timer(runs)
    return made[min(milliseconds, key=milliseconds.__getitem__)], {**found, **milliseconds}
