"""What the CPU engine's code is written for, and the choice of tiles, panels and shares. Plain integers."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from fxdbsr.kernels.jit import Target

PANEL_BYTES = 256 * 1024  # of packed input that a thread works on: what a second-level cache holds
_WAYS = 8  # lines of a 4 KB column of the first-level cache


@dataclass(frozen=True)
class Job:
    """All that the code for one conv knows. Sizes are (rows, columns) of one image.

    Args:
        target: what the code is for.
        bfloat16: dtype of every tensor; float32 otherwise.
        channels: (C, O) over all groups.
        size: (H, W); (0, 0) where `flat`.
        out: (P, Q); (0, 0) where `flat`.
        tile: (rows, columns) of pixels; one row where `flat`.
        flat: 1x1, stride 1, unpadded: the batch is one run of pixels.
        pack: the input is copied to scratch `[columns of blocks, panel rows, panel columns, BC]` first.
        panel_rows: output rows of a panel; unused where `flat`.
        parallel: call the OpenMP runtime.
    """

    target: Target
    bfloat16: bool
    channels: tuple[int, int]
    groups: int
    block: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    size: tuple[int, int]
    out: tuple[int, int]
    bias: bool
    residual: bool
    activation: str
    negative_slope: float
    tile: tuple[int, int]
    flat: bool
    pack: bool
    panel_rows: int
    parallel: bool

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of blocks in a group."""
        sizes = self.channels[1] // self.groups, self.channels[0] // self.groups
        return ceil(sizes[0] / self.block[0]), ceil(sizes[1] / self.block[1])

    @property
    def edge(self) -> int:
        """Outputs of the last block row of a group."""
        return self.channels[1] // self.groups - (self.grid[0] - 1) * self.block[0]

    @property
    def step(self) -> tuple[int, int]:
        """Distance of neighbouring outputs' inputs in the panel; along a 1-tap axis only those are packed."""
        return tuple(1 if k == 1 else s for k, s in zip(self.kernel, self.stride, strict=True))  # type: ignore[return-value]

    @property
    def panel(self) -> tuple[int, int]:
        """(rows, columns) of the packed panel; unused where `flat`."""
        parts = zip((self.panel_rows, self.out[1]), self.step, self.dilation, self.kernel, strict=True)
        return tuple((n - 1) * s + d * (k - 1) + 1 for n, s, d, k in parts)  # type: ignore[return-value]

    @property
    def pitches(self) -> tuple[int, int]:
        """Elements of x from an output pixel to the next below and to the right."""
        if self.pack:
            return self.step[0] * self.panel[1] * self.block[1], self.step[1] * self.block[1]
        return self.stride[0] * self.size[1] * self.channels[0], self.stride[1] * self.channels[0]

    @property
    def element(self) -> str:
        """IR type that an element is copied with."""
        return "i16" if self.bfloat16 else "float"

    @property
    def bytes(self) -> int:
        """Bytes of an element."""
        return 2 if self.bfloat16 else 4


def sides(target: Target, height: int) -> bool:
    """Whether blocks `height` high take several k side by side in a vector."""
    return height < target.lanes and target.lanes % height == 0 and not target.halves


def tile_pixels(target: Target, height: int) -> tuple[int, int]:
    """Pixels of a tile for blocks `height` high: as few as hide the latency, as many as registers hold.

    Registers hold the sums beside the weights and an input. About 6 multiplications are under way at a time
    where a vector goes through in halves, else 12.
    """
    vectors = min(target.vectors, ceil(height / target.lanes))
    most = (target.registers - vectors - 1) // vectors
    most = min(most, most // 2 if sides(target, height) else 28)
    return ceil((6 if target.halves and height >= target.lanes else 12) / vectors), most


def _cost(tiles: int, pixels: int, least: int) -> float:
    """Time of tiles of that many pixels: the weights' loads cost about as much as most of a pixel."""
    return tiles * (max(pixels, least) + 0.6)


def flat_tile(pixels: int, limits: tuple[int, int]) -> int:
    """Pixels of a tile for a run of `pixels`; `limits` by `tile_pixels`."""
    least, most = limits
    return min(range(1, min(pixels, most) + 1), key=lambda n: (_cost(ceil(pixels / n), n, least), -n))


def image_tile(
    out: tuple[int, int], limits: tuple[int, int], taps: int, rows: tuple[int, int, int, int]
) -> tuple[int, int]:
    """(rows, columns) of a tile for output size `out`.

    Args:
        out: (P, Q).
        limits: by `tile_pixels`.
        taps: kernel rows.
        rows: input rows H and stride, padding, dilation along them.
    """
    (P, Q), (H, stride, padding, dilation), (least, most) = out, rows, limits

    def cost(tile: tuple[int, int]) -> float:
        met = 0
        for top in range(0, P, tile[0]):
            last = min(top, P - tile[0]) + tile[0] - 1
            first = last - tile[0] + 1
            for r in range(0, taps * dilation, dilation):
                met += last * stride + r >= padding and first * stride + r < H + padding
        return _cost(met * ceil(Q / tile[1]), tile[0] * tile[1], least)

    tiles = []
    for columns in {ceil(Q / n) for n in range(ceil(Q / most), Q + 1)}:
        tiles += [(height, columns) for height in range(1, min(P, most // columns) + 1)]
    return min(tiles, key=lambda t: (cost(t), -t[0] * t[1], t))


def conflicts(pitch: int, pixels: int) -> bool:
    """Whether lines `pitch` bytes apart, one a pixel, crowd each other out of the first-level cache."""
    sets = 1
    while pitch % (4096 // sets) and sets < 64:
        sets *= 2
    return sets * _WAYS < pixels


def split(tiles: int, fit: int, images: int, rows: int, threads: int) -> tuple[int, int]:
    """(panels of an image, groups of block rows) that give each thread about equally much.

    Args:
        tiles: of an image, or rows of tiles.
        fit: how many of them fit in the cache.
        images: in the batch.
        rows: rows of blocks.
        threads: that share the work.
    """
    panels = max(1, ceil(tiles / fit))
    if images % threads == 0:
        return panels, 1
    even = min(ceil(panels / threads) * threads, max(tiles, 1))
    if ceil(tiles / threads) * threads <= 1.05 * tiles or rows < 2 * threads:
        return even, 1
    return panels, 1 if images * panels >= 4 * threads else threads
