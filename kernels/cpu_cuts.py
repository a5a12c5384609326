"""How the CPU engine cuts a conv into tiles and tasks: its code, and the tables that this reads. Plain integers."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.cpu_conv import Conv
from fxdbsr.kernels.cpu_layout import Layout, Order
from fxdbsr.kernels.cpu_plan import Geometry
from fxdbsr.kernels.jit import Target

PANEL_BYTES = 256 * 1024  # of input that a task works on: what a second-level cache holds beside the weights
TASKS = 4  # of a step for each thread, so that one that is held up leaves the rest to others


def code_of(
    conv: Geometry, target: Target, x: Layout, y: Layout, residual: Layout | None, images: int
) -> tuple[Conv, int]:
    """The code for these layouts, and the images that it sees."""
    grid, order = conv.grid, conv.order(target)
    out = y.size[0] * conv.pool[0], y.size[1] * conv.pool[1]
    (stride, padding), size = (conv.stride, conv.padding), x.size
    layouts = [layout for layout in (x, y, residual) if layout is not None]
    if grid.kernel_size == stride == conv.pool == (1, 1) and all(layout.border == (0, 0) for layout in layouts):
        # a run of pixels, over all images where each is one plane
        many = images if all(layout.block >= layout.channels for layout in layouts) else 1
        images, size = images // many, (1, many * size[0] * size[1])
        out, layouts = size, [replace(layout, size=size) for layout in layouts]
        x, y, residual = layouts[0], layouts[1], layouts[2] if residual else None
    section = grid.out_channels if order.spread else grid.out_channels // grid.groups
    edge = section - (ceil(section / grid.block_size[0]) - 1) * grid.block_size[0]
    limits = tile_pixels(target, order)
    taps = size[0], stride[0], padding[0], conv.dilation[0]
    if order.tiles:
        tile = register_tile(out, 2 if order.height > 16 else 4, conv.pool)
    else:
        tile = image_tile(out, limits, grid.kernel_size[0], taps, conv.pool)
    group = grid.out_channels // grid.groups, grid.in_channels // grid.groups
    r, s = grid.kernel_size
    code = Conv(
        target,
        conv.bfloat16,
        grid.block_size,
        order,
        group,
        (r, s),
        stride,
        padding,
        conv.dilation,
        x,
        y,
        residual,
        out,
        tile,
        edge,
        conv.bias,
        conv.activation,
        conv.negative_slope if conv.activation == "leaky_relu" else 0.0,
        conv.pool,
    )
    return code, images


def row_table(code: Conv, grid: BlockGrid) -> list[int]:
    """`cpu_steps.ROW` for each block row."""
    table: list[int] = []
    outputs, inputs = code.group
    for first, last in grid.rows():
        x = code.x.at(first // outputs * inputs, -code.padding[0], -code.padding[1])
        residual = code.residual.at(first) if code.residual else 0
        table += [x, code.y.at(first), residual, first, int(last - first < code.block[0])]
    return table


def line_table(code: Conv) -> list[int]:
    """First and last + 1 kernel row that meets the image in a tile from each output row on."""
    table: list[int] = []
    (stride, _), (pad, _), (step, _), (R, _) = code.stride, code.padding, code.dilation, code.kernel
    for top in range(code.out[0]):
        bottom = min(top + code.tile[0], code.out[0]) - 1
        met = [
            r for r in range(R) if bottom * stride + r * step >= pad and top * stride + r * step < code.x.size[0] + pad
        ]
        table += [met[0], met[-1] + 1] if met else [0, 0]
    return table


def task_table(code: Conv, rows: int, nnz: int, images: int, threads: int) -> list[int]:
    """`cpu_steps.TASK` for each task: panels of tiles that the cache holds, by groups of block rows.

    Where panels are too few for the threads, what all of them read is cut: the kept weights, or else the input.
    """
    (P, Q), (height, width) = code.out, code.patch
    lines, columns = ceil(P / height), ceil(Q / width)
    down, across = (min(step, taps) for step, taps in zip(code.stride, code.kernel, strict=True))  # what is read of it
    line = code.x.line * across // code.stride[1]
    line_bytes = down * height * line * ceil(code.x.channels / code.x.block) * code.element[1]
    along = columns if lines == 1 else lines  # what panels are cut from
    panels = ceil(along / max(1, min(along, PANEL_BYTES * along // max(1, lines * line_bytes))))
    wanted = TASKS * threads * (2 if along % panels else 1)  # smaller tasks where panels are of two sizes
    weights = nnz * code.order.block(code.block[1], code.kernel[0] * code.kernel[1])
    groups = 1
    if images * panels < wanted and threads > 1:
        if weights > lines * line_bytes // code.element[1]:
            groups = min(rows, ceil(wanted / (images * panels)))
        else:
            panels = min(along, ceil(wanted / images))
            groups = min(rows, ceil(wanted / (images * panels)))
    table: list[int] = []
    for image in range(images):
        for panel in range(panels):
            first, last = (i * along // panels for i in (panel, panel + 1))
            span = (
                (0, P, first * width, min(last * width, Q))
                if lines == 1
                else (first * height, min(last * height, P), 0, Q)
            )
            for group in range(groups):
                table += [image, *span, group * rows // groups, (group + 1) * rows // groups]
    return table


def tile_pixels(target: Target, order: Order) -> tuple[int, int]:
    """Pixels of a tile: as few as hide the latency of multiplications, as many as registers hold.

    Registers hold the sums beside the weights and an input. About 8 multiplications are under way at a time.
    """
    vectors = min(target.vectors, ceil(order.height * order.sums / target.lanes))
    most = (target.registers - vectors - 1) // vectors
    return ceil(8 / vectors), min(most, 28 if order.sums == 1 else most // 2)


def _cost(tiles: int, pixels: int, least: int) -> float:
    """Time of tiles of that many pixels: their weights, from the second-level cache, cost as much as 1.5 pixels."""
    return tiles * (max(pixels, least) + 1.5)


def image_tile(
    out: tuple[int, int],
    limits: tuple[int, int],
    taps: int,
    rows: tuple[int, int, int, int],
    pool: tuple[int, int] = (1, 1),
) -> tuple[int, int]:
    """(rows, columns) of a tile for output size `out`.

    Args:
        out: (P, Q).
        limits: by `tile_pixels`.
        taps: kernel rows.
        rows: input rows H and stride, padding, dilation along them.
        pool: windows that a tile, or tiles below each other, must fill; `out` is a multiple of it.
    """
    (P, Q), (H, stride, padding, dilation), (least, most) = out, rows, limits

    def cost(tile: tuple[int, int]) -> float:
        total = 0.0
        for first in range(0, P, tile[0]):
            last = min(first + tile[0], P) - 1
            met = sum(
                last * stride + r >= padding and first * stride + r < H + padding
                for r in range(0, taps * dilation, dilation)
            )
            total += _cost(met * ceil(Q / tile[1]), (last - first + 1) * tile[1], least)
        return total

    tiles = []
    for columns in {_multiple(ceil(Q / n), pool[1]) for n in range(ceil(Q / most), min(Q, 4 * ceil(Q / most) + 8) + 1)}:
        heights = range(1, min(P, most // columns) + 1)
        tiles += [(height, columns) for height in heights if 0 in (height % pool[0], pool[0] % height)]
    return min(tiles, key=lambda t: (cost(t), -t[0] * t[1], t))


def _multiple(count: int, of: int) -> int:
    return ceil(count / of) * of


def register_tile(out: tuple[int, int], registers: int, pool: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    """(rows, columns) of a tile for output size `out` and so many tile registers, each of equally many pixels of a row.

    A tile, or tiles below each other, fill windows of `pool`, of which `out` is a multiple.
    A multiplication takes the time of 17 pixels and one for each pixel (measured on an Intel Xeon with AMX).
    """
    P, Q = out
    best, least = (1, pool[1]), float("inf")
    for columns in range(1, min(Q, 16 * registers) + 1):
        pieces = ceil(columns / 16)
        if columns % pieces or columns % pool[1]:
            continue
        for rows in range(1, min(P, registers // pieces) + 1):
            if rows % pool[0] and pool[0] % rows:
                continue
            time = ceil(P / rows) * ceil(Q / columns) * rows * (17 * pieces + columns)
            if time < least or (time == least and rows * columns > best[0] * best[1]):
                best, least = (rows, columns), time
    return best
