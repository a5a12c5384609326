"""The CPU engine's steps, written as LLVM IR: what one task of a conv, a copy or a pool does.

A step is the function `@step(arguments, task)` of a module. Its tasks may be done in any order and by any threads.
`arguments` is a block of 64-bit integers, addresses but for the last of a conv; nobody writes to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd

from fxdbsr.kernels import cpu_amx, cpu_tile
from fxdbsr.kernels.cpu_layout import Layout
from fxdbsr.kernels.cpu_tile import Conv
from fxdbsr.kernels.jit import Target
from fxdbsr.kernels.llvm import Code

CONV = ("x", "y", "residual", "bias", "w", "crow", "col", "rows", "lines", "tasks", "nnz")
IMAGES = ("x", "y")
TASK = ("image", "top", "bottom", "left", "right", "first", "last")
ROW = ("x", "y", "residual", "bias", "edge")
_MINUS_INFINITY = "0xFFF0000000000000"


def module(code: Code, arguments: Sequence[str], others: Sequence[str] = ()) -> str:
    """The module of a step whose body is `code`; `others` are further functions and declarations."""
    loads = Code()
    for i, name in enumerate(arguments):
        loads.emit(f"%{name} = load {'i64' if name == 'nnz' else 'ptr'}, ptr {loads.at('%arguments', i, 'i64')}")
    code.lines[:0] = [line.replace("%v.", "%argument.") for line in loads.lines]
    integers = [f"declare i64 @llvm.{name}.i64(i64, i64)" for name in ("smin", "smax", "umin")]
    return "\n".join([*integers, *others, code.function("define void @step(ptr %arguments, i64 %task) nounwind")])


def conv_step(conv: Conv) -> str:
    """The step whose task is some tiles of an image for some block rows; arguments `CONV`.

    Args:
        conv: what the code knows. Its tables, int32: tasks, `TASK` each: first and last + 1 output row, column and
            block row; rows, `ROW` for each block row: where its first output and its group's first input lie in an
            image, whether it is the last row of a group; lines, for each output row: first and last + 1 kernel row
            that meets the image in a tile that starts there.
    """
    code, element = Code(), conv.element[0]
    image, top, bottom, left, right, first_row, last_row = (
        code.index("%tasks", code.add(code.mul("%task", len(TASK)), i)) for i in range(len(TASK))
    )
    layouts = {"x": conv.x, "y": conv.y, "residual": conv.residual}
    images = [
        code.at(f"%{name}", code.mul(image, layout.image), element) if layout else "%y"
        for name, layout in layouts.items()
    ]

    def block_row(row: str) -> None:
        stop = code.least(code.index("%crow", code.add(row, 1)), "%nnz")  # wrong indices must not read beyond
        start = code.least(code.index("%crow", row), stop)
        *offsets, edge = (code.index("%rows", code.add(code.mul(row, len(ROW)), i)) for i in range(len(ROW)))
        *pointers, bias = (code.at(at, i, element) for at, i in zip([*images, "%bias"], offsets, strict=True))
        block = conv.order.block(conv.block[1], conv.kernel[0] * conv.kernel[1])
        w, col = code.at("%w", code.mul(start, block), conv.weight[0]), code.at("%col", start, "i32")
        fixed = [f"ptr {bias}", f"ptr {w}", f"ptr {col}", f"i64 {code.op('sub', stop, start)}"]
        tiles = partial(_tiles, code, conv, (top, bottom, left, right), pointers, fixed)
        if conv.edge == conv.block[0]:
            tiles(False)
        else:
            code.when(code.value(f"icmp ne i64 {edge}, 0"), partial(tiles, True), partial(tiles, False))

    code.loop("row", first_row, last_row, 1, block_row)
    write, declarations = cpu_tile.tile, cpu_tile.declarations(conv)
    if conv.order.tiles:
        code.emit("call void @llvm.x86.tilerelease()")
        write, declarations = cpu_amx.tile, [*declarations, *cpu_amx.DECLARATIONS]
    parts = sorted({*conv.parts(False), *conv.parts(True)})
    return module(code, CONV, [*declarations, *(write(conv, *part) for part in parts)])


def _tiles(
    code: Code, conv: Conv, window: tuple[str, str, str, str], pointers: list[str], fixed: list[str], edge: bool
) -> None:
    """Call the micro-kernels for the tiles of a window of outputs (top, bottom, left, right)."""
    top, bottom, left, right = window
    steps = [(layout.line, layout.pixel) if layout else (0, 0) for layout in (conv.x, conv.y, conv.residual)]
    steps[0] = conv.stride[0] * steps[0][0], conv.stride[1] * steps[0][1]

    def line(a: str) -> None:
        a = code.least(a, conv.out[0] - conv.tile[0])
        meets = [f"i64 {code.index('%lines', code.add(code.mul(a, 2), i))}" for i in (0, 1)]

        def one(b: str) -> None:
            b = code.least(b, conv.out[1] - conv.tile[1])
            at = [
                code.at(pointer, code.add(code.mul(a, down), code.mul(b, across)), conv.element[0])
                for pointer, (down, across) in zip(pointers, steps, strict=True)
            ]
            given = ", ".join([*(f"ptr {p}" for p in at), *fixed, *meets])
            for start, count in conv.parts(edge):
                code.emit(f"call void @tile_{start}_{count}({given})")

        code.loop("column", left, right, conv.tile[1], one)

    code.loop("line", top, bottom, conv.tile[0], line)


@dataclass(frozen=True)
class Copy:
    """An image from layout `x` to layout `y`, whose border and what fills up its planes are written as zeros."""

    target: Target
    bfloat16: bool
    x: Layout
    y: Layout

    def pieces(self) -> tuple[int, int]:
        """(channels, number): from the first channel on, pieces of so many lie side by side in both layouts."""
        if self.x.groups > 1 or self.y.groups > 1:
            return 1, 0
        vector = self.target.lanes * (2 if self.bfloat16 else 1)
        size = gcd(vector, *(layout.block for layout in (self.x, self.y) if layout.block < self.x.channels))
        return size, self.x.channels // size


def copy_step(copy: Copy) -> str:
    """The step whose task is a row of y, border included, of an image; arguments `IMAGES`."""
    code, x, y, element = Code(), copy.x, copy.y, "i16" if copy.bfloat16 else "float"
    (H, W), (top, left) = y.size, y.border
    image, row = code.op("udiv", "%task", H + 2 * top), code.op("urem", "%task", H + 2 * top)
    above = code.op("sub", row, top)
    from_ = code.at("%x", code.add(code.mul(image, x.image), code.add(code.mul(above, x.line), x.at(0))), element)
    to = code.at("%y", code.add(code.mul(image, y.image), code.mul(row, y.line)), element)

    def column(b: str) -> None:
        pixel = code.at(to, code.mul(b, y.pixel), element)
        source = code.at(from_, code.mul(code.op("sub", b, left), x.pixel), element)
        inside, outside = (
            partial(_copy_pixel, code, copy, source, pixel),
            partial(_clear_pixel, code, copy, pixel, y.pixel),
        )
        if y.border == (0, 0):
            return inside()
        within = [code.value(f"icmp ult i64 {i}, {n}") for i, n in ((above, H), (code.op("sub", b, left), W))]
        return code.when(code.value(f"and i1 {within[0]}, {within[1]}"), inside, outside)

    code.loop("column", 0, W + 2 * left, 1, column)
    return module(code, IMAGES)


def _put(code: Code, copy: Copy, to: str, count: int, source: str | None) -> None:
    """`count` elements from `source`, or zeros, in pieces that a register holds."""
    element, start = "i16" if copy.bfloat16 else "float", 0
    while start < count:
        n = min(copy.target.lanes * (2 if copy.bfloat16 else 1), 1 << ((count - start).bit_length() - 1))
        kind, value = f"<{n} x {element}>", "zeroinitializer"
        if source:
            value = code.load(code.at(source, start, element), kind, 1)
        code.emit(f"store {kind} {value}, ptr {code.at(to, start, element)}, align 1")
        start += n


def _clear_pixel(code: Code, copy: Copy, pixel: str, least: int) -> None:
    """Zeros to a pixel in all planes of y that hold fewer than `least` channels, or fill its distance to the next."""
    for channel, count in copy.y.runs():
        if count < least or copy.y.pixel == least:
            at = code.at(pixel, copy.y.at(channel) - copy.y.at(0), "i16" if copy.bfloat16 else "float")
            _put(code, copy, at, copy.y.pixel, None)


def _copy_pixel(code: Code, copy: Copy, source: str, pixel: str) -> None:
    x, y, element = copy.x, copy.y, "i16" if copy.bfloat16 else "float"
    size, whole = copy.pieces()
    if any(count < y.pixel for _, count in y.runs()):
        _clear_pixel(code, copy, pixel, y.pixel)

    def piece(i: str) -> None:
        at = [
            code.add(
                code.mul(code.op("udiv", i, layout.block // size), layout.plane),
                code.mul(code.op("urem", i, layout.block // size), size),
            )
            for layout in (x, y)
        ]
        _put(code, copy, code.at(pixel, at[1], element), size, code.at(source, at[0], element))

    if whole:
        code.loop("piece", 0, whole, 1, piece)
    for channel in range(whole * size, x.channels):
        offsets = [layout.at(channel) - layout.at(0) for layout in (x, y)]
        _put(code, copy, code.at(pixel, offsets[1], element), 1, code.at(source, offsets[0], element))


@dataclass(frozen=True)
class Pool:
    """The largest or the mean of the pixels in windows; sizes and steps are (rows, columns).

    Args:
        kind: "max", over what lies in the image, or "mean", unpadded.
        out: (P, Q).
        x, y: layouts with planes of equally many channels.
    """

    target: Target
    bfloat16: bool
    kind: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    out: tuple[int, int]
    x: Layout
    y: Layout


def pool_step(pool: Pool) -> str:
    """The step whose task is a row of outputs of an image; arguments `IMAGES`."""
    code, x, y, lanes = Code(), pool.x, pool.y, pool.target.lanes
    element = "i16" if pool.bfloat16 else "float"
    image, a = code.op("udiv", "%task", pool.out[0]), code.op("urem", "%task", pool.out[0])
    from_ = code.at("%x", code.add(code.mul(image, x.image), x.at(0)), element)
    to = code.at("%y", code.add(code.mul(image, y.image), code.add(code.mul(a, y.line), y.at(0))), element)

    def window(at: str, axis: int) -> tuple[str, str]:
        start = code.op("sub", code.mul(at, pool.stride[axis]), pool.padding[axis])
        return code.most(start, 0), code.least(code.add(start, pool.kernel[axis]), x.size[axis])

    rows = window(a, 0)

    def column(b: str) -> None:
        columns, pixel = window(b, 1), code.at(to, code.mul(b, y.pixel), element)

        def piece(plane: str, start: str | int, count: int) -> None:
            at_x = code.at(from_, code.add(code.mul(plane, x.plane), start), element)
            at_y = code.at(pixel, code.add(code.mul(plane, y.plane), start), element)
            n = max(4, 1 << (count - 1).bit_length())
            code.store_floats(_pooled(code, pool, at_x, (*rows, *columns), n, count), n, at_y, 0, count, pool.bfloat16)

        def planes(plane: str) -> None:
            whole = x.block // lanes * lanes
            code.loop("piece", 0, whole, lanes, lambda start: piece(plane, start, lanes))
            if whole < x.block:
                piece(plane, whole, x.block - whole)

        code.loop("plane", 0, -(-x.channels // x.block), 1, planes)

    code.loop("column", 0, pool.out[1], 1, column)
    return module(code, IMAGES)


def _pooled(code: Code, pool: Pool, source: str, window: tuple[str, str, str, str], n: int, count: int) -> str:
    """The pool of `count` channels at `source` over the window (top, bottom, left, right), in n lanes."""
    vector, element = f"<{n} x float>", "i16" if pool.bfloat16 else "float"
    top, bottom, left, right = window

    def one(h: str, w: str, found: str) -> list[str]:
        at = code.at(source, code.add(code.mul(h, pool.x.line), code.mul(w, pool.x.pixel)), element)
        value = code.floats(at, 0, n, count, pool.bfloat16)
        if pool.kind == "mean":
            return [code.value(f"fadd {vector} {found}, {value}")]
        larger = code.value(f"fcmp ogt {vector} {value}, {found}")
        is_nan = code.value(f"fcmp uno {vector} {value}, {value}")
        take = code.value(f"or <{n} x i1> {larger}, {is_nan}")
        return [code.value(f"select <{n} x i1> {take}, {vector} {value}, {vector} {found}")]

    def row(h: str, found: str) -> list[str]:
        return code.loop("w", left, right, 1, lambda w, found: one(h, w, found), [(vector, found)])

    first = "zeroinitializer" if pool.kind == "mean" else f"<{', '.join([f'float {_MINUS_INFINITY}'] * n)}>"
    (found,) = code.loop("h", top, bottom, 1, row, [(vector, first)])
    if pool.kind == "max":
        return found
    area = ", ".join([f"float {float(pool.kernel[0] * pool.kernel[1])!r}"] * n)
    return code.value(f"fdiv {vector} {found}, <{area}>")
