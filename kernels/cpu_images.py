"""The CPU engine's steps on images, written as LLVM IR: what one task of a copy between layouts or of a pool does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import gcd

from fxdbsr.kernels.cpu_activation import maximum
from fxdbsr.kernels.cpu_layout import Layout
from fxdbsr.kernels.cpu_steps import step
from fxdbsr.kernels.jit import Target
from fxdbsr.kernels.llvm import Code, splat

IMAGES = ("x", "y")  # arguments
_MINUS_INFINITY = "0xFFF0000000000000"


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
    code, x, y = Code(copy.bfloat16), copy.x, copy.y
    (H, W), (top, left) = y.size, y.border
    image, row = code.op("udiv", "%task", H + 2 * top), code.op("urem", "%task", H + 2 * top)
    above = code.op("sub", row, top)
    from_ = code.at("%x", code.add(code.mul(image, x.image), code.add(code.mul(above, x.line), x.at(0))))
    to = code.at("%y", code.add(code.mul(image, y.image), code.mul(row, y.line)))

    def column(b: str) -> None:
        pixel = code.at(to, code.mul(b, y.pixel))
        source = code.at(from_, code.mul(code.op("sub", b, left), x.pixel))
        inside, outside = (
            partial(_copy_pixel, code, copy, source, pixel),
            partial(_clear_pixel, code, copy, pixel, y.pixel),
        )
        if y.border == (0, 0):
            return inside()
        within = [code.value(f"icmp ult i64 {i}, {n}") for i, n in ((above, H), (code.op("sub", b, left), W))]
        return code.when(code.value(f"and i1 {within[0]}, {within[1]}"), inside, outside)

    code.loop("column", 0, W + 2 * left, 1, column)
    return step(code, IMAGES)


def _put(code: Code, copy: Copy, to: str, count: int, source: str | None) -> None:
    """`count` elements from `source`, or zeros, in pieces that a register holds."""
    start = 0
    while start < count:
        n = min(copy.target.lanes * (2 if copy.bfloat16 else 1), 1 << ((count - start).bit_length() - 1))
        kind, value = f"<{n} x {code.element}>", "zeroinitializer"
        if source:
            value = code.load(code.at(source, start), kind, 1)
        code.emit(f"store {kind} {value}, ptr {code.at(to, start)}, align 1")
        start += n


def _clear_pixel(code: Code, copy: Copy, pixel: str, least: int) -> None:
    """Zeros to a pixel in all planes of y that hold fewer than `least` channels, or fill its distance to the next."""
    for channel, count in copy.y.runs():
        if count < least or copy.y.pixel == least:
            at = code.at(pixel, copy.y.at(channel) - copy.y.at(0))
            _put(code, copy, at, copy.y.pixel, None)


def _copy_pixel(code: Code, copy: Copy, source: str, pixel: str) -> None:
    x, y = copy.x, copy.y
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
        _put(code, copy, code.at(pixel, at[1]), size, code.at(source, at[0]))

    if whole:
        code.loop("piece", 0, whole, 1, piece)
    for channel in range(whole * size, x.channels):
        offsets = [layout.at(channel) - layout.at(0) for layout in (x, y)]
        _put(code, copy, code.at(pixel, offsets[1]), 1, code.at(source, offsets[0]))


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
    code, x, y, lanes = Code(pool.bfloat16), pool.x, pool.y, pool.target.lanes
    image, a = code.op("udiv", "%task", pool.out[0]), code.op("urem", "%task", pool.out[0])
    from_ = code.at("%x", code.add(code.mul(image, x.image), x.at(0)))
    to = code.at("%y", code.add(code.mul(image, y.image), code.add(code.mul(a, y.line), y.at(0))))

    def window(at: str, axis: int) -> tuple[str, str]:
        start = code.op("sub", code.mul(at, pool.stride[axis]), pool.padding[axis])
        return code.most(start, 0), code.least(code.add(start, pool.kernel[axis]), x.size[axis])

    rows = window(a, 0)

    def column(b: str) -> None:
        columns, pixel = window(b, 1), code.at(to, code.mul(b, y.pixel))

        def piece(plane: str, start: str | int, count: int) -> None:
            at_x = code.at(from_, code.add(code.mul(plane, x.plane), start))
            at_y = code.at(pixel, code.add(code.mul(plane, y.plane), start))
            n = max(4, 1 << (count - 1).bit_length())
            code.store_floats(_pooled(code, pool, at_x, (*rows, *columns), n, count), n, at_y, 0, count)

        def planes(plane: str) -> None:
            whole = x.block // lanes * lanes
            code.loop("piece", 0, whole, lanes, lambda start: piece(plane, start, lanes))
            if whole < x.block:
                piece(plane, whole, x.block - whole)

        code.loop("plane", 0, -(-x.channels // x.block), 1, planes)

    code.loop("column", 0, pool.out[1], 1, column)
    return step(code, IMAGES)


def _pooled(code: Code, pool: Pool, source: str, window: tuple[str, str, str, str], n: int, count: int) -> str:
    """The pool of `count` channels at `source` over the window (top, bottom, left, right), in n lanes."""
    vector = f"<{n} x float>"
    top, bottom, left, right = window

    def one(h: str, w: str, found: str) -> list[str]:
        at = code.at(source, code.add(code.mul(h, pool.x.line), code.mul(w, pool.x.pixel)))
        value = code.floats(at, 0, n, count)
        if pool.kind == "mean":
            return [code.value(f"fadd {vector} {found}, {value}")]
        return [maximum(code, found, value, n)]

    def row(h: str, found: str) -> list[str]:
        return code.loop("w", left, right, 1, lambda w, found: one(h, w, found), [(vector, found)])

    first = "zeroinitializer" if pool.kind == "mean" else splat(f"float {_MINUS_INFINITY}", n)
    (found,) = code.loop("h", top, bottom, 1, row, [(vector, first)])
    if pool.kind == "max":
        return found
    area = splat(f"float {float(pool.kernel[0] * pool.kernel[1])!r}", n)
    return code.value(f"fdiv {vector} {found}, {area}")
