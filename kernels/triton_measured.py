"""What the gather kernel's tiles and a library's convs cost on an H200 or H100: fitted to times of whole layers.

A layer of ResNet-50 or VGG-11 on a tile takes

    launch + norm(clocks / clock, bytes / (BANDWIDTH * bandwidth))
    clocks = norm(throughput, latency)
    throughput = (programs * (fixed + epilogue) + steps * step) / multiprocessors
    latency    = START + steps of the longest program * latency
    epilogue   = RESIDUAL * fixed if it adds one, ACTIVATION or ACTIVATION_WIDE for each output that takes exponentials

with norms that are close to maxima, that of clocks more than that with memory. `python -m bench.gpu_fit` holds the
costs below against what was measured. Steps of half the depth take a share of it. tf32 was measured on one layer: its
steps have as many bytes as those of 16 bits, and L2, not the matrix unit, limits both.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxdbsr.kernels.triton_configs import Tile

LAUNCH = 1.19e-6
START = 4570
RESIDUAL = 0.64
ACTIVATION = 0.067
ACTIVATION_WIDE = 0.111  # in tiles of 128 outputs: fewer programs at a time to hide exponentials behind
BANDWIDTH = 0.985
MEMORY_ORDER = 2.27
UNMEASURED = 1.6  # times what the resource model says is what the tiles that were measured take
HALF_STEP = {"16": 0.41, "ieee": 0.5, "3xtf32": 0.5}


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
    ("16", 128, 128, 8, 3): Cost(3550, 946, 870),
    ("16", 64, 128, 4, 3): Cost(2060, 582, 696),
    ("16", 64, 128, 4, 2): Cost(1290, 620, 1130),
    ("16", 128, 64, 4, 2): Cost(1790, 650, 1240),
    ("16", 64, 64, 4, 2): Cost(764, 348, 1050),
    ("16", 64, 64, 4, 4): Cost(1380, 407, 545),
    ("16", 128, 32, 4, 2): Cost(887, 565, 1410),
    ("16", 64, 32, 4, 4): Cost(587, 403, 758),
    ("ieee", 128, 32, 4, 3): Cost(911, 1800, 5020),
    ("ieee", 64, 32, 4, 3): Cost(405, 1080, 3980),
    ("ieee", 64, 64, 4, 3): Cost(543, 1590, 4320),
    ("ieee", 64, 128, 8, 3): Cost(2050, 2960, 4870),
    ("3xtf32", 128, 32, 4, 3): Cost(1700, 1080, 1810),
    ("3xtf32", 64, 32, 4, 3): Cost(665, 579, 1870),
}


def cost_of(tile: Tile, precision: str, target: str) -> Cost | None:
    """The cost of a tile; None where it was not measured."""
    if target != "cuda:90":
        return None
    return COSTS.get(("16" if precision == "tf32" else precision, tile.pixels, tile.outputs, tile.warps, tile.stages))


def work_clocks(
    cost: Cost,
    tile: Tile,
    precision: str,
    programs: float,
    steps: float,
    residual: bool = False,
    activation: str = "none",
) -> float:
    """Clocks of multiprocessors for so many programs, of so many steps together, with that epilogue."""
    fixed = cost.fixed * (1 + RESIDUAL * residual)
    if activation in ("silu", "sigmoid"):
        fixed += (ACTIVATION_WIDE if tile.outputs >= 128 else ACTIVATION) * tile.pixels * tile.outputs
    return programs * fixed + steps * cost.step * _share(tile, precision)


def clocks(cost: Cost, tile: Tile, precision: str, work: float, longest: float, processors: int) -> float:
    """Clocks until `work_clocks` are done.

    Args:
        longest: steps of the longest program.
    """
    return norm(work / processors, START + longest * cost.latency * _share(tile, precision), 4)


def _share(tile: Tile, precision: str) -> float:
    """Of a whole step, that one of the tile's depth takes."""
    if tile.depth * (2 if precision == "16" else 4) >= 128:
        return 1.0
    return HALF_STEP["16" if precision == "tf32" else precision]


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
        pointwise: what takes the place of `launch` in fused 1x1 convs that add no residual.
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
