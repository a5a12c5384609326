"""Every tile that could run a layer, timed: what the planner's table of tiles is made from.

The gather kernel of each form of a conv in many more tiles than are shipped, each checked against float64 first, all
replayed in turns with cuDNN's conv, plain and fused. A tile is named pixels x outputs x depth, warps, stages; "b":
copies of 8 bytes, through L1; "p": pixels are the first operand of the product; "/n": the reduction split in n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from bench.gpu_convs import Problem
from bench.gpu_setting import Setting
from fxdbsr.kernels.geometry import empty_output, output_size
from fxdbsr.kernels.triton_call import Call
from fxdbsr.kernels.triton_configs import Tile, tiles
from fxdbsr.kernels.triton_device import Device
from fxdbsr.kernels.triton_forms import Form, work
from fxdbsr.kernels.triton_layer import Layer
from fxdbsr.kernels.triton_machine_code import SHARED_LIMIT
from fxdbsr.kernels.triton_pack import pack, run_length
from fxdbsr.kernels.triton_plan import Choice, choose_tile, entry_width
from fxdbsr.kernels.triton_roofline import sparse_forms

SPLITS = (1, 2, 4)
MOST_PROGRAMS = 300  # that a split reduction may have
DEEP = 512  # products along the reduction from which steps of twice the depth are tried

# pixels, outputs, warps, stages
WIDE = (
    (64, 128, 4, 3), (64, 128, 4, 4), (128, 128, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 128, 8, 4),
    (256, 128, 8, 2), (256, 128, 8, 3), (256, 128, 8, 4),
    (64, 64, 4, 2), (64, 64, 4, 4), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 3),
    (256, 64, 4, 3), (256, 64, 8, 2), (256, 64, 8, 3), (256, 64, 8, 4),
)  # fmt: skip
PIXELS_FIRST = ((128, 128, 8, 3), (128, 64, 4, 3))
NARROW = ((64, 32, 4, 4), (128, 32, 4, 2), (128, 32, 4, 4), (256, 32, 4, 3), (256, 32, 8, 3))
CACHED = ((128, 64, 4, 3), (256, 64, 8, 3), (128, 128, 8, 3), (256, 128, 8, 3))
TWICE_AS_DEEP = ((128, 128, 8, 2), (128, 64, 4, 2), (128, 64, 4, 3), (64, 64, 4, 3), (256, 128, 8, 2))
IEEE = (
    (64, 128, 8, 3), (64, 128, 4, 3), (64, 128, 4, 2), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 2),
    (64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3), (128, 32, 4, 3), (64, 32, 4, 3), (128, 32, 4, 2),
)  # fmt: skip


def listed(target: str, precision: str, lanes: int, depth: int, taps: int) -> dict[str, Tile]:
    """The tiles that are tried for tables of that many lanes and that depth, the shipped ones among them, by name."""
    found = list(tiles(target, precision, lanes, depth, taps))
    if precision == "ieee":
        found += [Tile(p, o, depth, w, s, False) for p, o, w, s in IEEE if o <= lanes]
    elif precision in ("16", "tf32") and lanes >= 64:
        found += [Tile(p, o, depth, w, s, True) for p, o, w, s in WIDE if o <= lanes]
        found += [Tile(p, o, depth, w, s, False) for p, o, w, s in PIXELS_FIRST if o <= lanes]
        if taps > 1:
            found += [Tile(p, o, depth, w, s, True, ".ca", 8) for p, o, w, s in CACHED if o <= lanes]
    elif precision in ("16", "tf32"):
        found += [Tile(p, lanes, depth, w, s, False) for p, _, w, s in NARROW]
    fitting = (tile for tile in found if tile.shared_bytes(precision) <= SHARED_LIMIT["cuda:90"])
    return {name(tile): tile for tile in dict.fromkeys(fitting)}


def name(tile: Tile) -> str:
    """Such as "128x64x64 w4 s3"."""
    marks = " b" * (tile.copy < 16) + " p" * (not tile.weights_first)
    return f"{tile.pixels}x{tile.outputs}x{tile.depth} w{tile.warps} s{tile.stages}{marks}"


def planned(layer: Layer, form: Form, device: Device) -> tuple[Tile, int]:
    """The tile and the parts of the reduction that the planner takes for a form."""
    done = work(layer.grid, layer.columns, form, layer.dtype.itemsize)
    sizes = (layer.pixels, done.unions, done.steps, done.lanes, done.depth, prod(layer.grid.kernel_size))
    return choose_tile(*sizes, form.precision, device.processors, device.target)


class Tables:
    """The tables of one form of a conv, and what runs them with any tile."""

    def __init__(self, problem: Problem, form: Form, depth: int | None = None) -> None:
        self.problem, self.form = problem, form
        self.made = pack(problem.layer.grid, *problem.packed, form, depth)
        self.bias = problem.bias

    @property
    def lanes(self) -> int:
        return self.made[4].shape[1]

    @property
    def depth(self) -> int:
        return self.made[3].shape[-1]

    def to(self, device: torch.device) -> Tables:
        """Themselves, moved."""
        self.made, self.bias = [table.to(device) for table in self.made], self.bias.to(device)
        return self

    def run(self, tile: Tile, splits: int = 1) -> Callable[[Tensor, Tensor | None], Tensor]:
        """The conv with `tile`."""
        from fxdbsr.kernels import triton_gather  # not before it is known whether it is interpreted

        layer, grid = self.problem.layer, self.problem.layer.grid
        width = entry_width(grid.in_channels, grid.block_size[1], grid.groups, self.depth)
        lanes = run_length(grid.out_channels, grid.block_size[0], grid.groups)
        precision = Choice.of(self.made[0].shape).precision

        def conv(x: Tensor, residual: Tensor | None) -> Tensor:
            spatial = output_size(x.shape[2:], grid.kernel_size, *layer.geometry)
            output = empty_output(x, grid.out_channels, spatial)
            call = Call(x, self.bias, residual, output, grid.kernel_size, *layer.geometry, layer.activation, 0.0)
            partial = None
            if splits > 1:
                partial = torch.empty((splits, output.numel()), dtype=torch.float32, device=x.device)
            triton_gather.launch(call, self.made[1:], partial, width, lanes, precision, tile)
            return output

        return conv


def runs(problem: Problem, pixels: int, target: str) -> Iterator[tuple[str, Tables, Tile, int]]:
    """Name, tables, tile and splits of the reduction: all that is tried on a conv with that many output pixels."""
    layer = problem.layer
    taps = prod(layer.grid.kernel_size)
    for form in sparse_forms(replace(layer, allow_3xtf32=True)):
        if form.kernel != "gather":
            continue
        tables = Tables(problem, form)
        shape = (form.precision, tables.lanes, tables.depth, taps)
        for label, tile in listed(target, *shape).items():
            programs = tables.made[4].shape[0] * (tables.lanes // tile.outputs) * -(-pixels // tile.pixels)
            for splits in SPLITS:
                if splits == 1 or (programs * splits <= MOST_PROGRAMS and tile in tiles(target, *shape)):
                    yield f"{form}, {label}" + (f" /{splits}" if splits > 1 else ""), tables, tile, splits
        if form.precision == "16" and tables.lanes >= 64 and prod(layer.grid.weight_shape[1:]) >= DEEP:
            deep = Tables(problem, form, 2 * tables.depth)
            for p, o, w, s in TWICE_AS_DEEP:
                if o <= tables.lanes:
                    tile = Tile(p, o, deep.depth, w, s, True)
                    yield f"{form}, {name(tile)}", deep, tile, 1


def measure(layer: Layer, setting: Setting) -> dict[str, Any]:
    """Microseconds of every form and tile that is right, beside cuDNN's; what is wrong."""
    problem = Problem.of(layer, setting.device, 2 if setting.rehearse else 0)
    arms: dict[str, Callable[[Tensor, Tensor | None], Tensor]]
    arms = {"eager": problem.eager, "fused cuDNN": problem.fused}
    wrong = {}
    for label, tables, tile, splits in runs(problem, layer.pixels, "cuda:90"):
        run = tables.run(tile, splits)
        reason = problem.why_wrong(run, 1)
        if reason is None:
            arms[label] = run
        else:
            wrong[label] = reason[:200]
    timed = setting.times({label: problem.in_turn(arm) for label, arm in arms.items()}, "eager")
    medians = {label: (timed.get(f"us {label}") or [None] * 2)[1] for label in arms}
    return {"us": medians} | ({"refused": wrong} if wrong else {})


def compile_all(problem: Problem, batch: int, target: str) -> list[str]:
    """Compile the kernel of every form and tile for `batch` images; what went wrong."""
    x, residual = (None if t is None else t.to("meta").repeat(batch, 1, 1, 1) for t in problem.inputs[0])
    assert x is not None
    failed = []
    for label, tables, tile, splits in runs(problem, batch * problem.layer.pixels, target):
        try:
            run = tables.to(torch.device("meta")).run(tile, splits)
            run(x.contiguous(memory_format=torch.channels_last), residual)
        except Exception as error:
            failed.append(f"{label}: {type(error).__name__}: {str(error)[-200:]}")
    return failed
