"""Whether a layer is faster dense or block-sparse: a roofline model, not a measurement.

    dense  = launch + max(FLOP / (0.8 peak), bytes / bandwidth, latency)
    sparse = launch + max(waves * (fixed + steps * step_clocks * BM/128) / clock, bytes / bandwidth, latency)

bytes: input, output, residual and the stored weights, each touched once (a strided 1x1 conv reads only the
pixels that it needs). FLOP: two a product. waves: programs of the gather kernel over processors, rounded up.
latency: 1500 clocks and 60 for each step along the reduction. The dense candidate is cuDNN's conv with ReLU
and residual fused, which reaches four fifths of the peak. Numbers default to an NVIDIA H200's data sheet.
Sparse is chosen from a gain of MARGIN on: less is within the error of the model.

Columns of a union are estimated from the share of stored blocks d as 1 - (1 - d)^G, times what clustering of
rows saves (0.86 for G = 2, 0.80 for 4), at least d.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

import torch

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.geometry import output_size
from fxdbsr.kernels.triton_plan import FLOP_PER_CLOCK, choose_tile, lanes, precision_of, step_clocks

CLUSTERING = {1: 1.0, 2: 0.86, 4: 0.80}
FIXED_CLOCKS = 1000
MARGIN = 1.05
PRECISION_NAMES = {"16": "16-bit", "tf32": "tf32", "ieee": "ieee float32"}


@dataclass(frozen=True)
class Device:
    """What the model knows of a GPU.

    Args:
        processors: streaming multiprocessors.
        clock: clocks a second.
        bandwidth: bytes a second of device memory.
        launch: seconds that any kernel costs.
        efficiency: share of the peak that the dense candidate reaches.
        vendor: as in `triton_plan.choose_tile`.
    """

    processors: int = 132
    clock: float = 1.83e9
    bandwidth: float = 4.8e12
    launch: float = 2e-6
    efficiency: float = 0.8
    vendor: str = "cuda:90"

    def peak(self, precision: str) -> float:
        """FLOP a second."""
        return FLOP_PER_CLOCK[precision] * self.processors * self.clock


H200 = Device()


@dataclass(frozen=True)
class Layer:
    """One conv at one input size.

    Args:
        size: input height and width.
        density: share of the blocks that are stored, 0 to 1.
    """

    grid: BlockGrid
    batch: int
    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    dtype: torch.dtype
    density: float
    residual: bool = False

    @property
    def pixels(self) -> int:
        """Output pixels, N*P*Q."""
        spatial = output_size(self.size, self.grid.kernel_size, self.stride, self.padding, self.dilation)
        return self.batch * prod(spatial)

    def bytes(self, density: float) -> int:
        """Bytes of device memory touched, with that share of the weights."""
        grid = self.grid
        read = self.batch * prod(self.size)
        if prod(grid.kernel_size) == 1:
            read = min(read, self.pixels)
        elements = read * grid.in_channels + self.pixels * grid.out_channels * (2 if self.residual else 1)
        return round((elements + prod(grid.weight_shape) * density) * self.dtype.itemsize)


@dataclass(frozen=True)
class Choice:
    """The cheapest of the gather kernel's forms, and the dense conv beside it; times in seconds.

    Args:
        ceiling: how much faster than dense the layer could be if the sparse kernel met the roofline.
    """

    rows_per_union: int
    sparse: float
    dense: float
    ceiling: float


def dense_seconds(layer: Layer, device: Device = H200) -> float:
    """Seconds of the dense conv."""
    precision = precision_of(layer.dtype)
    reduction = prod(layer.grid.weight_shape[1:])
    flop = 2 * layer.pixels * layer.grid.out_channels * reduction
    latency = (1500 + 60 * ceil(reduction * layer.dtype.itemsize / 128)) / device.clock
    work = flop / (device.efficiency * device.peak(precision))
    return device.launch + max(work, layer.bytes(1) / device.bandwidth, latency)


def sparse_seconds(layer: Layer, rows_per_union: int, device: Device = H200) -> float:
    """Seconds of the gather kernel with that many rows of blocks to a union."""
    grid, precision = layer.grid, precision_of(layer.dtype)
    taps = prod(grid.kernel_size)
    per_group = grid.out_channels // grid.groups
    height = min(grid.block_size[0], per_group)
    unions = grid.groups * ceil(ceil(per_group / height) / rows_per_union)
    share = max(layer.density, (1 - (1 - layer.density) ** rows_per_union) * CLUSTERING[rows_per_union])
    depth = 128 // layer.dtype.itemsize
    steps = ceil(share * grid.in_channels // grid.groups * taps / depth)
    outputs = lanes(min(height * rows_per_union, per_group))
    tile, splits = choose_tile(
        layer.pixels,
        unions,
        max(steps * unions, 1),
        outputs,
        depth,
        taps,
        precision,
        device.processors,
        device.vendor,
    )
    waves = ceil(unions * ceil(layer.pixels / tile.pixels) * splits / device.processors)
    clocks = FIXED_CLOCKS * tile.warps / 4
    clocks += ceil(steps / splits) * step_clocks(outputs, precision, taps) * tile.pixels / 128
    latency = (1500 + 60 * ceil(steps / splits)) / device.clock
    work = waves * clocks / device.clock
    extra = 0.0
    if splits > 1:  # partial sums out and in, and a second kernel
        extra = device.launch + 8 * splits * layer.pixels * grid.out_channels / device.bandwidth
    return device.launch + extra + max(work, layer.bytes(layer.density) / device.bandwidth, latency)


def choose(layer: Layer, device: Device = H200) -> Choice:
    """The cheapest number of rows to a union, its time and the dense one's."""
    height = min(layer.grid.block_size[0], layer.grid.out_channels // layer.grid.groups)
    sizes = [size for size in CLUSTERING if size == 1 or size * height <= 128]
    times = {size: sparse_seconds(layer, size, device) for size in sizes}
    best = min(times, key=times.__getitem__)
    dense = dense_seconds(layer, device)
    work = 2 * layer.pixels * prod(layer.grid.weight_shape) * layer.density
    floor = max(work / device.peak(precision_of(layer.dtype)), layer.bytes(layer.density) / device.bandwidth)
    return Choice(best, times[best], dense, dense / (device.launch + floor))


def why_dense(layer: Layer, device: Device = H200) -> str | None:
    """A sentence that says why the layer should stay dense, or None where the sparse kernel should win.

    Raises:
        ValueError: a density outside 0 to 1.
    """
    if not 0 <= layer.density <= 1:
        raise ValueError(f"density: expected 0 to 1, got {layer.density}")
    channels = layer.grid.in_channels // layer.grid.groups
    vector = 16 // layer.dtype.itemsize
    if channels % vector or layer.grid.block_size[1] % vector:
        return f"copies of 16 bytes need channels and block widths in multiples of {vector}, here {channels}"
    choice = choose(layer, device)
    if MARGIN * choice.sparse < choice.dense:
        return None
    name = PRECISION_NAMES[precision_of(layer.dtype)]
    text = f"{name} dense is estimated at {1e6 * choice.dense:.1f} us, sparse at {1e6 * choice.sparse:.1f} us"
    if choice.ceiling < 1.1:
        return f"{text}: memory traffic and launch, which sparsity does not save, bound it"
    return text
