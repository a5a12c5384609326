"""What the gather kernel's tiles and a library's convs cost on an H200 or H100: fitted to times of whole layers.

A layer of ResNet-50 or VGG-11 on a tile takes

    launch + norm(clocks / clock, bytes / (BANDWIDTH * bandwidth))
    clocks = norm(throughput, latency)
    throughput = (programs * (fixed + epilogue) + steps * step) / multiprocessors * uneven
    latency    = START + steps of the longest program * latency
    epilogue   = SCATTERED / bytes of neighbouring outputs * fixed, RESIDUAL of both if it adds one, ACTIVATION or
                 ACTIVATION_WIDE for each output that takes exponentials
    uneven     = (n rounded up / n) ^ UNEVEN, n programs a multiprocessor, while all run at once;
                 (n/2 rounded up / (n/2)) ^ UNEVEN_PAIRS where they are more

with norms that are close to maxima, that of clocks more than that with memory. `python -m bench.gpu_fit` holds the
costs below against what was measured. Steps of half the depth take a share of it, those that copy less than 64 bytes of
a pixel at a time NARROW times as long. tf32 was measured on one layer: its steps have as many bytes as those of 16
bits, and L2, not the matrix unit, limits both.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from fxdbsr.kernels.triton_configs import Tile

LAUNCH = 1.19e-6
START = 4570
RESIDUAL = 0.45
SCATTERED = 13.0  # bytes
ACTIVATION = 0.063
ACTIVATION_WIDE = 0.108  # in tiles of 128 outputs: fewer programs at a time to hide exponentials behind
BANDWIDTH = 0.985
MEMORY_ORDER = 2.27
UNMEASURED = 1.6  # times what the resource model says is what the tiles that were measured take
HALF_STEP = {"16": 0.62, "ieee": 0.5, "3xtf32": 0.5}
NARROW, NARROW_BYTES = 1.2, 64
UNEVEN, UNEVEN_PAIRS = 0.8, 0.45
SHARED_BYTES, RESERVED_BYTES = 228 * 1024, 1024  # of a multiprocessor, and of each program beside its stages
THREADS = 512  # that have 128 registers each


@dataclass(frozen=True)
class Cost:
    """Clocks of a tile.

    Args:
        fixed: of a multiprocessor for a program, beside its steps.
        step: of a multiprocessor for a step.
        latency: of a step in a program that has the multiprocessor to itself.
    """

    fixed: float
    step: float
    latency: float


# (precision, pixels, outputs, warps, stages)
COSTS = {
    ("16", 128, 128, 8, 3): Cost(3100, 814, 1070),
    ("16", 64, 128, 4, 3): Cost(1640, 514, 687),
    ("16", 64, 128, 4, 2): Cost(1300, 554, 1160),
    ("16", 128, 64, 4, 2): Cost(1530, 637, 1340),
    ("16", 64, 64, 4, 2): Cost(661, 346, 1050),
    ("16", 64, 64, 4, 4): Cost(1140, 386, 663),
    ("16", 128, 32, 4, 2): Cost(774, 576, 1180),
    ("16", 64, 32, 4, 4): Cost(792, 276, 1510),
    ("ieee", 128, 32, 4, 3): Cost(1120, 1740, 3800),
    ("ieee", 64, 32, 4, 3): Cost(424, 1060, 2310),
    ("ieee", 64, 64, 4, 3): Cost(683, 1490, 3340),
    ("ieee", 64, 128, 8, 3): Cost(3480, 2600, 3700),
    ("3xtf32", 128, 32, 4, 3): Cost(1700, 1040, 1670),
    ("3xtf32", 64, 32, 4, 3): Cost(671, 567, 1640),
}


def cost_of(tile: Tile, precision: str, target: str) -> Cost | None:
    """The cost of a tile; None where it was not measured."""
    if target != "cuda:90":
        return None
    return COSTS.get(("16" if precision == "tf32" else precision, tile.pixels, tile.outputs, tile.warps, tile.stages))


@dataclass(frozen=True)
class Load:
    """What a kernel has to do.

    Args:
        programs: of the grid.
        steps: of all programs.
        longest: steps of the longest program.
        bytes: that a step copies of a pixel at a time.
        piece: bytes of neighbouring outputs that a program writes, on average.
        residual: whether it adds one.
        activation: by which it ends.
    """

    programs: float
    steps: float
    longest: float
    bytes: int = NARROW_BYTES
    piece: float = 256
    residual: bool = False
    activation: str = "none"


def work_clocks(cost: Cost, tile: Tile, precision: str, load: Load) -> float:
    """Clocks of multiprocessors, all of them together."""
    fixed = cost.fixed * (1 + SCATTERED / load.piece) * (1 + RESIDUAL * load.residual)
    if load.activation in ("silu", "sigmoid"):
        fixed += (ACTIVATION_WIDE if tile.outputs >= 128 else ACTIVATION) * tile.pixels * tile.outputs
    return load.programs * fixed + load.steps * cost.step * _share(tile, precision, load)


def clocks(cost: Cost, tile: Tile, precision: str, load: Load, processors: int) -> float:
    """Clocks until all is done."""
    busy = work_clocks(cost, tile, precision, load) / processors * uneven(tile, precision, load.programs / processors)
    return norm(busy, START + load.longest * cost.latency * _share(tile, precision, load), 4)


def resident(tile: Tile, precision: str) -> int:
    """Programs that a multiprocessor runs at a time."""
    by_memory = SHARED_BYTES // (tile.shared_bytes(precision) + RESERVED_BYTES)
    return max(1, min(by_memory, THREADS // (32 * tile.warps)))


def uneven(tile: Tile, precision: str, each: float) -> float:
    """How much longer the busiest multiprocessor takes than all on average, of `each` programs on average."""
    if each <= 1:
        return 1.0
    if each <= resident(tile, precision):
        return float((ceil(each) / each) ** UNEVEN)
    return float((ceil(each / 2) / (each / 2)) ** UNEVEN_PAIRS)


def _share(tile: Tile, precision: str, load: Load) -> float:
    """Of a whole step of wide copies, that one of the tile's depth takes."""
    narrow = NARROW if load.bytes < NARROW_BYTES else 1.0
    if tile.depth * (2 if precision == "16" else 4) >= 128:
        return narrow
    return narrow * HALF_STEP["16" if precision == "tf32" else precision]


def norm(a: float, b: float, order: float) -> float:
    """(a^order + b^order)^(1/order), which is close to the larger one."""
    most = max(a, b, 1e-30)
    return float(most * ((a / most) ** order + (b / most) ** order) ** (1 / order))


LIBRARY_TILE = 128
LIBRARY_ORDER = 3.45


@dataclass(frozen=True)
class Library:
    """What a conv of cuDNN costs, epilogue included: norm(launch + FLOP / (share * peak) + latency, bytes / bandwidth).

    Args:
        launch: seconds that any of its convs takes; float32 ones rearrange their tensors.
        efficiency: share of the peak.
        pointwise: what takes the place of `launch` in 1x1 convs of stride 1 that add no residual.
        bandwidth: share of the device's.
        adding: the share in convs that add a residual.
        latency: seconds for each 64 products of a sum.
    """

    launch: float
    efficiency: float
    pointwise: float
    bandwidth: float
    adding: float
    latency: float

    def seconds(
        self,
        products: float,
        moved: float,
        reduction: int,
        outputs: int,
        pointwise: bool = False,
        residual: bool = False,
    ) -> float:
        """Seconds of `products` seconds at the peak and `moved` seconds of memory traffic at full bandwidth.

        Fewer outputs than a tile is wide take as long as a whole tile.
        """
        computing = products * max(1, LIBRARY_TILE / outputs) / self.efficiency + reduction / 64 * self.latency
        launch = self.pointwise if pointwise and not residual else self.launch
        return norm(launch + computing, moved / (self.adding if residual else self.bandwidth), LIBRARY_ORDER)


_16 = Library(8.4e-6, 0.815, 4.0e-6, 0.60, 0.55, 15e-9)
CUDNN = {"16": _16, "tf32": _16, "ieee": Library(71e-6, 0.555, 71e-6, 0.84, 0.84, 279e-9)}
