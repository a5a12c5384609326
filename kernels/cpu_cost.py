"""What a conv costs on a CPU by each of its candidates: a model from shapes and density, not a measurement.

    dense    fixed + MACs / rate + weights packed at each call + input and output moved
    cpu      fixed + MACs of the kept blocks, padding included / rate of their height + input read and output moved
    compact  dense on the channels that hold a block + the input's channels gathered, the output's put in place

in microseconds of one core of the machine of bench/results/choice.jsonl (Intel Xeon, AVX-512), from which the numbers
are fitted (`python -m bench.choice`); only ratios count, and threads share all terms alike. Where the size of the
input is not known, it is taken for one image of `SIDE` a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from fxdbsr.kernels.compact import channels_with_blocks
from fxdbsr.kernels.cpu_plan import work_by_height
from fxdbsr.kernels.geometry import output_size

if TYPE_CHECKING:
    from fxdbsr.kernels.choice import Case

SIDE = 28
FIXED = {"dense": 70.0, "cpu": 38.0}
RATE = {"dense": 59e3, "cpu": 79e3}  # MACs a microsecond
PACK = 0.22e-3  # microseconds a byte of weights that torch reorders
MOVE = {"dense": 0.14e-3, "cpu": 0.18e-3}  # microseconds a byte of input and output
BREAK = 2.0  # how much cheaper torch's own must be: it breaks the run of steps that the convs around it are part of
GATHER = 0.4e-3  # microseconds a byte that index_select or index_copy moves


def cheapest(candidates: Sequence[str], case: Case) -> tuple[str, str]:
    """The one of `candidates` that costs least, and a sentence with what each of them costs."""
    if len(candidates) == 1:
        return candidates[0], ""
    costs = {name: microseconds(name, case) for name in candidates}
    share = {name: 1.0 if name == "cpu" or "cpu" not in costs else BREAK for name in costs}
    best = min(costs, key=lambda name: costs[name] * share[name])
    others = ", ".join(f"{name} {cost / costs[best]:.2f}" for name, cost in costs.items() if name != best)
    size = "x".join(map(str, _size(case)))
    known = f"at {size}" if case.size else f"at {size}, as the size is not known"
    breaks = ", but would break the run of steps" if min(costs.values()) < costs[best] else ""
    return best, f"{best} is expected to be fastest {known} ({others} times as long{breaks})"


def microseconds(engine: str, case: Case) -> float:
    """Expected time of a call on one core of the machine that the numbers are from."""
    grid, size = case.grid, _size(case)
    pixels = size[0] * prod(output_size(size[1:], grid.kernel_size, case.stride, case.padding, case.dilation))
    item = case.dtype.itemsize
    inputs, outputs = size[0] * prod(size[1:]), pixels
    if engine == "cpu":
        weights = min(work_by_height(grid, case.crow_indices, case.col_indices).values())
        read = grid.in_channels
        if grid.groups == 1:
            read = len(channels_with_blocks(grid, case.crow_indices, case.col_indices)[1])
        moved = (inputs * read + outputs * grid.out_channels) * item
        return FIXED["cpu"] + weights * prod(grid.kernel_size) * pixels / RATE["cpu"] + moved * MOVE["cpu"]
    out, in_, extra = grid.out_channels, grid.in_channels, 0.0
    if engine == "compact":
        rows, columns = channels_with_blocks(grid, case.crow_indices, case.col_indices)
        extra += GATHER * item * inputs * len(columns) if len(columns) < in_ else 0.0
        extra += GATHER * item * outputs * (out + len(rows)) if len(rows) < out else 0.0
        out, in_ = len(rows), len(columns)
    weights = out * (in_ // grid.groups) * prod(grid.kernel_size)
    moved = (inputs * in_ + outputs * out) * item
    return FIXED["dense"] + weights * pixels / RATE["dense"] + weights * item * PACK + moved * MOVE["dense"] + extra


def _size(case: Case) -> tuple[int, ...]:
    return (max(case.size[0], 1), *case.size[1:]) if case.size else (1, *(SIDE,) * len(case.stride))
