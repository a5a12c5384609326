"""Whether a layer is faster dense or block-sparse: a roofline model, not a measurement.

    sparse = launch + max(work, bytes / bandwidth, latency)
    dense  = the faster of what cuDNN can be called for:
        its conv, then one pass over memory for bias, residual and activation
        `torch.cudnn_convolution_relu` / `torch.cudnn_convolution_add_relu`, where the epilogue is theirs

The third dense candidate, this engine's kernels with all blocks, is beaten by the same kernels with the blocks
that are kept; its time says how much of a gain is the fused epilogue's and how much is sparsity's.

work: programs of fixed + steps * step clocks by `triton_cost`, spread over the processors (`triton_schedule`).
bytes: output, residual, the weights that are kept and the input channels that these read, each touched once (a strided
1x1 conv reads only the pixels that it needs). A max pool that follows is one more pass over memory, but where the
gather kernel takes it in.
latency: 1500 clocks and 60 for each step along the reduction. A cuDNN conv takes launch + max(FLOP / (0.8 peak), bytes
/ bandwidth, latency). Sparse is chosen from a gain of MARGIN on: less is within the error of the model.

Where the size of the input is not known, it is taken to be large: `triton_layer.SIZE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod
from typing import TYPE_CHECKING, Any

import torch

from fxdbsr.kernels.dense import why_unfused
from fxdbsr.kernels.triton_cost import fixed_clocks
from fxdbsr.kernels.triton_device import H200, Device, device_of
from fxdbsr.kernels.triton_forms import Form, forms, may_win, step_clocks, tiles_of, work
from fxdbsr.kernels.triton_layer import Layer
from fxdbsr.kernels.triton_measured import (
    BANDWIDTH,
    CUDNN,
    LAUNCH,
    MEMORY_ORDER,
    UNMEASURED,
    clocks,
    cost_of,
    norm,
)
from fxdbsr.kernels.triton_plan import choose_tile
from fxdbsr.kernels.triton_schedule import makespan

if TYPE_CHECKING:
    from fxdbsr.kernels.choice import Case

MARGIN = 1.125
PRECISION_NAMES = {"16": "16-bit", "tf32": "tf32", "ieee": "ieee float32", "3xtf32": "3xTF32"}


@dataclass(frozen=True)
class Choice:
    """The cheapest way to run the layer sparse and dense; times in seconds.

    Args:
        form: of the sparse kernels.
        sparse: its time.
        library: what of cuDNN runs the dense conv fastest.
        dense: its time.
        dense_triton: the time of this engine's kernels with all blocks.
        ceiling: how much faster than `dense` the layer could be if a kernel met the roofline.
    """

    form: Form
    sparse: float
    library: str
    dense: float
    dense_triton: float
    ceiling: float


def library_seconds(layer: Layer, device: Device = H200) -> dict[str, float]:
    """Seconds of every conv of cuDNN that can be called, with its epilogue, by its name."""
    layer = layer.full()
    moves = 2 + layer.residual if layer.bias or layer.residual or layer.activation != "none" else 0
    epilogue = device.launch + moves * layer.output_bytes / device.bandwidth if moves else 0.0
    pool = _pool_seconds(layer, device)
    found = {"cuDNN conv and epilogue kernel": _cudnn(layer, device) + epilogue + pool}
    unfused = why_unfused(torch.device("cuda"), layer.dtype, 2, layer.grid.groups, layer.activation)
    if unfused is None and device.target.startswith("cuda"):
        name = "cudnn_convolution_add_relu" if layer.residual else "cudnn_convolution_relu"
        found[name] = _cudnn(layer, device, fused=True) + pool
    return found


def _pool_seconds(layer: Layer, device: Device) -> float:
    """Seconds of a max pool of its own; 0 without one."""
    return device.launch + layer.pool_bytes / device.bandwidth if layer.pool > 1 else 0.0


def _cudnn(layer: Layer, device: Device, fused: bool = False) -> float:
    """Seconds of a conv of cuDNN, with all of its epilogue or none."""
    residual = fused and layer.residual
    grid, moved = layer.grid, layer.bytes(residual) / device.bandwidth
    reduction, products = prod(grid.weight_shape[1:]), layer.flop / device.peak(layer.precision)
    if device.target == "cuda:90":
        pointwise = prod(grid.kernel_size) == 1 and prod(layer.stride) == 1
        outputs = grid.out_channels // grid.groups
        return CUDNN[layer.precision].seconds(products, moved, reduction, outputs, pointwise, residual)
    latency = _latency(ceil(reduction * layer.dtype.itemsize / 128), device)
    return device.launch + max(products / device.efficiency, moved, latency)


def _latency(steps: int, device: Device) -> float:
    return (1500 + 60 * steps) / device.clock


def sparse_seconds(layer: Layer, form: Form, device: Device = H200) -> float:
    """Seconds of `form` on the layer."""
    taps = prod(layer.grid.kernel_size)
    found = work(layer.grid, layer.columns, form, layer.dtype.itemsize)
    tile, splits = tiles_of(form, found, taps, device)[0], 1
    if form.kernel == "gather":
        sizes = (layer.pixels, found.unions, found.steps, found.lanes, found.depth, taps)
        tile, splits = choose_tile(*sizes, form.precision, device.processors, device.target)
    slices = found.lanes // (tile.outputs * form.sums)
    inside = layer.pool if form.kernel == "gather" and splits == 1 else 1
    memory = layer.bytes(layer.residual, inside) / device.bandwidth
    again = _pool_seconds(layer, device) if inside == 1 else 0.0
    if splits > 1:  # partial sums out and in, and a second kernel
        again += device.launch + 8 * splits * layer.pixels * layer.grid.out_channels / device.bandwidth
    cost = cost_of(tile, form.precision, device.target) if form.kernel == "gather" else None
    if cost is not None:
        each = slices * ceil(layer.pixels / tile.pixels)
        load = found.load(each, splits, layer.residual, layer.activation)
        ended = clocks(cost, tile, form.precision, load, device.processors)
        return LAUNCH + norm(ended / device.clock, memory / BANDWIDTH, MEMORY_ORDER) + again
    step, fixed = step_clocks(form, found, tile, taps, device), fixed_clocks(tile, taps, form.sums)
    costs = [fixed + ceil(length / splits) * step for length in found.lengths]
    busy = makespan(costs, slices * ceil(layer.pixels / tile.pixels) * splits, device.processors)
    longest = _latency(ceil(found.longest / splits), device)
    seconds = device.launch + max(busy / device.clock, memory, longest) + again
    return seconds * (UNMEASURED if device.target == "cuda:90" else 1)


def sparse_forms(layer: Layer) -> list[Form]:
    """Every form that may run the layer."""
    found = forms(layer.grid, layer.precision)
    if layer.allow_3xtf32 and layer.precision == "ieee":
        found += forms(layer.grid, "3xtf32")
    return found


@lru_cache(4096)
def _choose(layer: Layer, precision: str, device: Device) -> Choice:
    weighed = [form for form in sparse_forms(layer) if may_win(form, device)]
    times = {form: sparse_seconds(layer, form, device) for form in weighed}
    form = min(times, key=times.__getitem__)
    full = layer.full()
    own = min(sparse_seconds(full, form, device) for form in times)
    libraries = library_seconds(layer, device)
    library = min(libraries, key=libraries.__getitem__)
    dense = libraries[library]
    floor = floor_seconds(layer, form.precision, device)
    return Choice(form, times[form], library, dense, own, dense / floor)


def floor_seconds(layer: Layer, precision: str, device: Device = H200) -> float:
    """Seconds of a kernel that meets the roofline, epilogue included, for the layer's blocks."""
    products = layer.flop / device.peak(precision)
    return device.launch + max(products, layer.bytes(layer.residual, layer.pool) / device.bandwidth)


def choose(layer: Layer, device: Device = H200) -> Choice:
    """The cheapest form, its time, and those of the dense conv beside it."""
    return _choose(layer, layer.precision, device)


def why_dense(layer: Layer, device: Device = H200) -> str | None:
    """A sentence that says why the layer should stay dense, or None where a sparse kernel should win."""
    channels = layer.grid.in_channels // layer.grid.groups
    vector = 16 // layer.dtype.itemsize
    if channels % vector or layer.grid.block_size[1] % vector:
        return f"copies of 16 bytes need channels and block widths in multiples of {vector}, here {channels}"
    choice = choose(layer, device)
    if MARGIN * choice.sparse < choice.dense:
        return None
    text = f"{PRECISION_NAMES[layer.precision]} {_compared(choice)}"
    if choice.ceiling < 1.1:
        return f"{text}: memory traffic and launch, which sparsity does not save, bound it"
    return text


def why_sparse(layer: Layer, device: Device = H200) -> str:
    """A sentence with both estimates, for a layer of which `why_dense` says nothing."""
    choice = choose(layer, device)
    return f"{PRECISION_NAMES[choice.form.precision]} {_compared(choice)} ({choice.form})"


def verdict(case: Case) -> tuple[dict[str, Any] | None, str]:
    """(arguments of `triton.tables`, or None for dense, and why); of cases that `triton.why_not` lets pass."""
    layer, model = Layer.of(case), device_of(case.device)
    reason = why_dense(layer, model)
    if reason is not None:
        return None, reason
    return choose(layer, model).form.arguments, why_sparse(layer, model)


def _compared(choice: Choice) -> str:
    dense = f"{1e6 * choice.dense:.1f} us ({choice.library}; {1e6 * choice.dense_triton:.1f} us with dense Triton)"
    return f"dense is estimated at {dense}, sparse at {1e6 * choice.sparse:.1f} us"
