"""What the gather kernel's tiles and a library's convs cost on an H100: fitted to measurements of whole layers.

A layer of ResNet-50 or VGG-11 on a tile takes

    launch + norm(clocks / clock, bytes / (share * bandwidth))
    clocks = norm(throughput, latency)
    throughput = (programs * fixed * (1 + RESIDUAL if it adds one) + steps * step) / multiprocessors
    latency    = START + steps of the longest program * latency

with norms of a high order, close to maxima. `python -m bench.gpu_fit` holds the costs below against the times in
`bench/results/gpu_tiles.jsonl` and `gpu_rounds.jsonl`: root mean square, single tiles are off by 7 to 12 % for float32,
by 8 to 20 % for 16 bits. Steps of half the depth take a share of it. tf32 was not measured: its steps have as many
bytes as those of 16 bits, and L2, not the matrix unit, limits both.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxdbsr.kernels.triton_configs import Tile

LAUNCH = 1e-6
START = 8230
RESIDUAL = 0.84
BANDWIDTH = 0.985
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
    ("16", 128, 128, 8, 3): Cost(3690, 1004, 840),
    ("16", 64, 128, 4, 3): Cost(1850, 537, 631),
    ("16", 64, 128, 4, 2): Cost(1470, 682, 934),
    ("16", 128, 64, 4, 2): Cost(1690, 878, 981),
    ("16", 64, 64, 4, 2): Cost(835, 425, 723),
    ("16", 64, 64, 4, 4): Cost(1020, 479, 439),
    ("16", 128, 32, 4, 2): Cost(872, 746, 927),
    ("16", 64, 32, 4, 4): Cost(577, 401, 511),
    ("ieee", 128, 32, 4, 3): Cost(1070, 1700, 5060),
    ("ieee", 64, 32, 4, 3): Cost(479, 1010, 4210),
    ("ieee", 64, 64, 4, 3): Cost(801, 1500, 4350),
    ("ieee", 64, 128, 8, 3): Cost(2310, 2830, 4630),
    ("3xtf32", 128, 32, 4, 3): Cost(1810, 1040, 1680),
    ("3xtf32", 64, 32, 4, 3): Cost(748, 558, 1750),
}


def cost_of(tile: Tile, precision: str, target: str) -> Cost | None:
    """The cost of a tile; None where it was not measured."""
    if target != "cuda:90":
        return None
    return COSTS.get(("16" if precision == "tf32" else precision, tile.pixels, tile.outputs, tile.warps, tile.stages))


def work_clocks(cost: Cost, tile: Tile, precision: str, programs: float, steps: float, residual: bool = False) -> float:
    """Clocks of multiprocessors for so many programs, of so many steps together."""
    return programs * cost.fixed * (1 + RESIDUAL * residual) + steps * cost.step * _share(tile, precision)


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


@dataclass(frozen=True)
class Library:
    """What a conv of cuDNN costs, epilogue included: launch + norm(FLOP / (share * peak) + latency, bytes / bandwidth).

    Args:
        launch: seconds that any of its convs takes; float32 ones rearrange their tensors.
        efficiency: share of the peak.
        bandwidth: share of the device's.
        latency: seconds for each 64 products of a sum.
    """

    launch: float
    efficiency: float
    bandwidth: float = 0.84
    latency: float = 44e-9

    def seconds(self, products: float, moved: float, reduction: int, outputs: int) -> float:
        """Seconds of `products` seconds at the peak and `moved` seconds of memory traffic at full bandwidth.

        Fewer outputs than a tile is wide take as long as a whole tile.
        """
        computing = products * max(1, LIBRARY_TILE / outputs) / self.efficiency + reduction / 64 * self.latency
        return self.launch + norm(computing, moved / self.bandwidth, 2.1)


CUDNN = {"16": Library(6.8e-6, 0.83), "tf32": Library(6.8e-6, 0.83), "ieee": Library(71e-6, 0.555, latency=279e-9)}
