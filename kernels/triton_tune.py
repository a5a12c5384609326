"""Choose a layer's form and tile by measuring them, at conversion, after their numbers are checked against float64.

`candidates` lists what there is to try: the forms of `triton_forms` with the planner's tile, the most promising by
its model first, then other tiles and splits of the reduction for the best form. A candidate is a dict of keyword
arguments of `triton.tables`, which JSON can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels import triton as engine
from fxdbsr.kernels.choice import Case
from fxdbsr.kernels.reference import activate
from fxdbsr.kernels.triton_configs import tiles
from fxdbsr.kernels.triton_device import device_of
from fxdbsr.kernels.triton_forms import work
from fxdbsr.kernels.triton_layer import Layer
from fxdbsr.kernels.triton_plan import MOST_SPLITS
from fxdbsr.kernels.triton_roofline import sparse_forms, sparse_seconds
from fxdbsr.kernels.triton_timing import graph_milliseconds

Candidate = dict[str, Any]
Timer = Callable[[Mapping[str, Callable[[], Tensor]]], dict[str, float]]


def candidates(layer: Layer, device: torch.device, tiles_of: int = 1) -> dict[str, Candidate]:
    """What there is to try on the layer, by name, the cheapest by the planner's model first.

    Args:
        tiles_of: forms, from the cheapest on, of which every tile and split of the reduction is tried.
    """
    model = device_of(device)
    found = sorted(sparse_forms(layer), key=lambda form: sparse_seconds(layer, form, model))
    listed = {str(form): form.arguments for form in found}
    for form in [form for form in found if form.kernel == "gather"][:tiles_of]:
        taps = prod(layer.grid.kernel_size)
        done = work(layer.grid, layer.columns, form, layer.dtype.itemsize)
        for index, tile in enumerate(tiles(model.target, form.precision, done.lanes, done.depth, taps)):
            programs = done.unions * (done.lanes // tile.outputs) * -(-layer.pixels // tile.pixels)
            for splits in (1, 2, 4, MOST_SPLITS):
                if splits > 1 and (programs * splits > 2 * model.processors or done.longest < 4 * splits):
                    continue
                # "b" marks what reads through L1 with narrow copies, "m" weights as the narrow first operand
                shape = f"{tile.pixels}x{tile.outputs}" + "b" * (tile.copy < 16)
                shape += "m" * (tile.weights_first and tile.outputs < 64) + f" w{tile.warps} s{tile.stages}"
                name = f"{form}, {shape}" + (f", {splits} splits" if splits > 1 else "")
                listed[name] = {**form.arguments, "tile": index, "splits": splits, "pixels": layer.pixels}
    return listed


def wrong(y: Tensor, exact: Tensor, eager: Tensor, products: int) -> str | None:
    """A sentence that says how far `y`, sums of `products` products, is off where that is too far; else None.

    Allowed are twice eager's error and an ulp; in float32 half an ulp times the root of `products` more, for our sums
    are one chain, which errs several times as much as the sums of a library that splits them.
    """
    ulps = 1 + (0.5 * products**0.5 if y.dtype == torch.float32 else 0)
    allowed = 2 * (eager - exact).abs().max() + ulps * torch.finfo(y.dtype).eps * exact.abs().max()
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
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    negative_slope: float = 0.01,
    choices: Mapping[str, Candidate] | None = None,
    repeats: int = 20,
    timer: Timer = graph_milliseconds,
) -> tuple[Candidate, dict[str, float | str]]:
    """The fastest candidate that gives right numbers, and what was found of each.

    Args:
        example: input `[N, I, H, W]` of the size that matters, on the device.
        residual: `[N, O, P, Q]` or None; like `bias` and `activation` what the layer's epilogue has.
        choices: from `candidates`; None: all of them.
        repeats: runs of a candidate that must agree bit for bit before it is timed.
        timer: milliseconds of each of some functions.

    Returns:
        Keyword arguments of `triton.tables`; for each candidate its milliseconds, or the sentence for which it is
        out of the race.

    Raises:
        RuntimeError: no candidate gives right numbers.
    """
    geometry = (stride, padding, dilation)
    packed = (values, crow_indices, col_indices)
    if choices is None:
        epilogue = (bias is not None, residual is not None, activation)
        size = (example.shape[0], *example.shape[2:])
        case = Case(grid, crow_indices, col_indices, *geometry, values.dtype, values.device, *epilogue, size)
        choices = candidates(Layer.of(case), values.device)
    weight = grid.unpack(*packed)
    sizes = (grid.in_channels, grid.out_channels)

    def dense(dtype: torch.dtype) -> Tensor:
        x, w = example[:1].to(dtype), weight.to(dtype)
        y = F.conv2d(x, w, None if bias is None else bias.to(dtype), *geometry, grid.groups)
        y = y if residual is None else y + residual[:1].to(dtype)
        return activate(y, activation, negative_slope)

    exact, eager = dense(torch.float64), dense(example.dtype)
    found: dict[str, float | str] = {}
    runs: dict[str, Callable[[], Tensor]] = {}
    for name, choice in choices.items():
        tables = engine.tables(grid, *packed, *geometry, **choice)

        def run(tables: list[Tensor] = tables) -> Tensor:
            return engine.conv(
                example, *packed, bias, residual, tables, *sizes, *geometry, grid.groups, activation, negative_slope
            )

        try:
            first = run()
            reason = wrong(first[:1], exact, eager, prod(grid.weight_shape[1:]))
            if reason is None and not all(torch.equal(run(), first) for _ in range(repeats)):
                reason = "two runs differ"
        except Exception as error:  # more resources than this GPU has, or a compiler that fails
            reason = f"{type(error).__name__}: {error}"
        if reason is None:
            runs[name] = run
        else:
            found[name] = reason
    if not runs:
        raise RuntimeError(f"no candidate of the Triton engine gives right numbers: {found}")
    with torch.cuda.device_of(example):  # whose streams and graphs hold the runs
        milliseconds = timer(runs)
    fastest = min(milliseconds, key=milliseconds.__getitem__)
    return choices[fastest], {**found, **milliseconds}
