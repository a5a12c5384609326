"""The CPU engine's micro-kernel, written as LLVM IR: a tile of pixels times the blocks of one block row.

The sums of `rows x columns` pixels times a few vectors of outputs stay in registers while the blocks stream past:

    prefetch the lines of the outputs
    for each block, each kernel row r that meets the image, each kernel column s, each unit of inputs k:
        load the weights of k, a vector or two; prefetch those that come 4 KB later
        for each pixel: broadcast its inputs k, multiply, add
    add bias and residual, apply the activation, store

Where a max pool with windows side by side follows, tiles are stored to a patch of the stack that fills windows, and the
maxima of the patch go to y: the whole output is never written.

Layouts are those of `cpu_layout`: a pixel's inputs of a block are neighbours in memory, and where planes are as wide
as blocks, those of neighbouring kernel columns follow, so that a kernel row is one run of k. A unit is one input, or
a pair of bfloat16, for each of the sums of an output; sums side by side are added at the end. Where a vector spans
several groups, its lanes take the inputs of their own groups from one load.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

from fxdbsr.kernels.cpu_activation import activated, maximum
from fxdbsr.kernels.cpu_conv import Conv
from fxdbsr.kernels.cpu_layout import Layout
from fxdbsr.kernels.llvm import Code

_PREFETCH = 4096  # bytes ahead of the weights in use
_DOT = "llvm.x86.avx512bf16.dpbf16ps."


def tile(conv: Conv, start: int, count: int) -> str:
    """The function `@tile_{rows}_{start}_{count}`: `count` outputs of a block row from `start` on, of so many rows.

    Its arguments: x, y, residual at the tile's first pixel, y, residual, bias at the block row's first output; w, col
    at its first block; n, its blocks; first, last + 1 of the kernel rows to meet.
    """
    return Tile(conv, start, count).write()


class Tile:
    """The writer of one micro-kernel."""

    def __init__(self, conv: Conv, start: int, count: int) -> None:
        self.conv, self.start, self.count, self.code = conv, start, count, Code(conv.bfloat16)
        self.pixels = [(a, b) for a in range(conv.tile[0]) for b in range(conv.tile[1])]
        lanes, sums = conv.target.lanes, conv.order.sums
        width = lanes // sums  # outputs of a whole vector
        least = width if conv.order.tiles else 4
        self.vectors = [  # (first output, outputs in the vector, outputs that count)
            (v, min(width, max(least, 1 << (start + count - v - 1).bit_length())), min(width, start + count - v))
            for v in range(start, start + count, width)
        ]
        self.types = [f"<{n * sums} x float>" for _ in self.pixels for _, n, _ in self.vectors]

    def write(self) -> str:
        """The function's text."""
        conv, size = self.conv, self.code.bytes
        for a, b in self.pixels if conv.written is conv.y else ():
            self._prefetch("%y", self.output(conv.y, a, b, self.start) * size, self.count * size, for_writing=True)
        first = ["zeroinitializer"] * len(self.vectors)
        if conv.bias and conv.order.sums == 1:
            first = [self.code.floats("%bias", start, n, count) for start, n, count in self.vectors]
        sums = iter(self._loop("block", 0, "%n", 1, self._block, first * len(self.pixels)))
        for a, b in self.pixels:
            for vector in self.vectors:
                self._store(next(sums), a, b, *vector)
        return self._function()

    def _function(self) -> str:
        pointers = ", ".join(f"ptr noalias %{name}" for name in ("x", "y", "residual", "bias", "w", "col"))
        name = f"tile_{self.conv.tile[0]}_{self.start}_{self.count}"
        head = f"define internal void @{name}({pointers}, i64 %n, i64 %first, i64 %last) noinline nounwind"
        return self.code.function(head)

    def _prefetch(self, pointer: str, first: int, size: int, for_writing: bool = False) -> None:
        """Fetch the lines that start in `size` bytes from byte `first` on."""
        for line in range(first, first + size, 64):
            at = self.code.at(pointer, line, "i8")
            how = [("i32", int(for_writing)), ("i32", 3), ("i32", 1)]  # kept near; data
            self.code.call("void", "llvm.prefetch.p0", ("ptr", at), *how)

    def _loop(
        self, name: str, start: int | str, stop: int | str, step: int, body: Callable[..., list[str]], sums: list[str]
    ) -> list[str]:
        """A loop that carries the sums; `body(i, sums)`."""
        carried = list(zip(self.types, sums, strict=True))
        return self.code.loop(name, start, stop, step, lambda i, *values: body(i, [*values]), carried)

    def _block(self, j: str, sums: list[str]) -> list[str]:
        conv, code, x = self.conv, self.code, "%x"
        (R, S), BC = conv.kernel, conv.block[1]
        if not conv.order.spread:
            last = conv.group[1] // BC - (conv.group[1] % BC == 0)  # a wrong index must not read outside of x
            column = code.call("i64", "llvm.umin.i64", ("i64", code.index("%col", j)), ("i64", last))
            plane, within = code.op("udiv", column, conv.x.block // BC), code.op("urem", column, conv.x.block // BC)
            x = code.at("%x", code.add(code.mul(plane, conv.x.plane), code.mul(within, BC)))
        block = conv.order.block(BC, R * S)
        w = code.at("%w", code.mul(j, block), conv.weight[0])

        def kernel_row(r: str, sums: list[str]) -> list[str]:
            at_x = code.at(x, code.mul(r, conv.dilation[0] * conv.x.line))
            at_w = code.at(w, code.mul(r, block // R), conv.weight[0])
            for first, taps, pixels in self._runs():
                run_x = code.at(at_x, first * conv.dilation[1] * conv.x.pixel)
                run_w = code.at(at_w, first * (block // R // S), conv.weight[0])
                sums = self._run(run_x, run_w, taps, pixels, sums)
            return sums

        return kernel_row("0", sums) if R == 1 else self._loop("row", "%first", "%last", 1, kernel_row, sums)

    def _runs(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """(first, number, pixels): kernel columns side by side in memory, the pixels that they meet.

        Where a tile spans its row of the image, what falls on the padding of a pixel is left out.
        """
        conv, runs = self.conv, list[tuple[int, int, tuple[int, ...]]]()
        (stride, pad, step, size) = conv.stride[1], conv.padding[1], conv.dilation[1], conv.x.size[1]
        for s in range(conv.kernel[1]):
            met = tuple(range(len(self.pixels)))
            if conv.tile[1] == conv.out[1] and not conv.order.tiles:
                met = tuple(p for p in met if 0 <= self.pixels[p][1] * stride - pad + s * step < size)
            if runs and runs[-1][2] == met and step == 1 and conv.x.pixel == conv.inputs and not conv.order.spread:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, met)
            elif met:
                runs.append((s, 1, met))
        return runs

    def _run(self, x: str, w: str, taps: int, pixels: tuple[int, ...], sums: list[str]) -> list[str]:
        """The run of k at x and w for some pixels, unrolled where it divides."""
        code, conv, order = self.code, self.conv, self.conv.order
        length = taps * conv.inputs // order.unit
        if order.spread:
            return self._steps(x, w, range(length), pixels, sums)
        unroll = max(n for n in range(1, 5) if length % n == 0)

        def steps(i: str, sums: list[str]) -> list[str]:
            at_x = code.at(x, code.mul(i, order.unit))
            at_w = code.at(w, code.mul(i, order.unit * order.height), conv.weight[0])
            return self._steps(at_x, at_w, range(unroll), pixels, sums)

        return self._loop("k", 0, length, unroll, steps, sums)

    def _steps(self, x: str, w: str, units: range, pixels: tuple[int, ...], sums: list[str]) -> list[str]:
        """The sums after so many units of inputs at x and weights at w."""
        code, conv, order, sums = self.code, self.conv, self.conv.order, [*sums]
        row = order.unit * order.height  # weights of a unit
        for i in units:
            lines = -(-i * row * conv.weight[1] // 64) * 64, (i + 1) * row * conv.weight[1]
            self._prefetch(w, lines[0] + _PREFETCH, lines[1] - lines[0])
            weights = [
                code.load(code.at(w, i * row + v * order.unit, conv.weight[0]), self._vector(n), conv.weight[1])
                for v, n, _ in self.vectors
            ]
            for p in pixels:
                a, b = self.pixels[p]
                at = a * conv.stride[0] * conv.x.line + b * conv.stride[1] * conv.x.pixel
                inputs: dict[tuple[int, int], str] = {}
                for v, (start, n, _) in enumerate(self.vectors):
                    key = (n, start if order.spread else 0)
                    if key not in inputs:
                        inputs[key] = self._spread(x, at, i, start, n) if order.spread else self._inputs(x, at, i, n)
                    at_sum = p * len(self.vectors) + v
                    sums[at_sum] = self._multiply(sums[at_sum], inputs[key], weights[v], n)
        return sums

    def _vector(self, n: int) -> str:
        """IR type of the weights of n outputs."""
        kind = "bfloat" if self.conv.bfloat16 and not self.conv.order.spread else "float"
        return f"<{n * self.conv.order.unit} x {kind}>"

    def _inputs(self, x: str, at: int, i: int, n: int) -> str:
        """Unit i of a pixel's inputs, once for each of n outputs."""
        code, order = self.code, self.conv.order
        kind = "float" if order.unit == 1 else f"i{8 * code.bytes * order.unit}"
        raw = code.load(code.at(x, at + i * order.unit), kind, code.bytes)
        one = code.value(f"insertelement <1 x {kind}> poison, {kind} {raw}, i32 0")
        spread = self.code.shuffle(kind, one, "poison", 1, [0] * n)
        return spread if order.unit == 1 else code.value(f"bitcast <{n} x {kind}> {spread} to {self._vector(n)}")

    def _spread(self, x: str, at: int, i: int, start: int, n: int) -> str:
        """Input i (counted over the taps) of each lane's own group."""
        outputs, inputs = self.conv.group
        first = start // outputs * inputs
        lanes = [(start + lane) // outputs * inputs + i - first for lane in range(n)]
        count = ((start + n - 1) // outputs + 1) * inputs - first
        loaded = self.code.floats(x, at + first, count, count)
        return self.code.shuffle("float", loaded, "poison", count, lanes)

    def _multiply(self, sums: str, x: str, w: str, n: int) -> str:
        code, n = self.code, n * self.conv.order.sums
        v, pairs = f"<{n} x float>", f"<{2 * n} x bfloat>"
        if self.conv.bfloat16 and not self.conv.order.spread:
            return code.call(v, f"{_DOT}{32 * n}", (v, sums), (pairs, w), (pairs, x))
        return code.call(v, f"llvm.fma.v{n}f32", (v, x), (v, w), (v, sums))

    def _store(self, value: str, a: int, b: int, start: int, n: int, count: int) -> None:
        """Epilogue of one vector of sums of the pixel (a, b), and its store in the planes that it belongs to."""
        conv, code = self.conv, self.code
        sums = conv.order.sums
        while sums > 1:
            even, odd = (self.code.shuffle("float", value, "poison", n * sums, range(i, n * sums, 2)) for i in (0, 1))
            sums //= 2
            value = code.value(f"fadd <{n * sums} x float> {even}, {odd}")
        if conv.bias and (conv.order.sums > 1 or conv.order.tiles):
            value = code.value(f"fadd <{n} x float> {value}, {self.code.floats('%bias', start, n, count)}")
        if conv.residual is not None:
            residual = self.code.floats("%residual", self.output(conv.residual, a, b, start), n, count)
            value = code.value(f"fadd <{n} x float> {value}, {residual}")
        value = activated(code, value, n, conv.activation, conv.negative_slope)
        code.store_floats(value, n, "%y", self.output(conv.written, a, b, start), count)

    def pool(self, code: Code, patch: str, y: str) -> None:
        """Write into `code` what takes the maxima of the windows of a patch of these outputs, at y."""
        conv, (down, across) = self.conv, self.conv.pool

        def column(j: str) -> None:
            source = code.at(patch, code.mul(j, across * conv.written.pixel))
            to = code.at(y, code.mul(j, conv.y.pixel))
            for i in range(conv.patch[0] // down):
                for start, n, count in self.vectors:
                    places = [(i * down + a, b) for a in range(down) for b in range(across)]
                    met = [code.floats(source, self.output(conv.written, *place, start), n, count) for place in places]
                    value = reduce(lambda found, other: maximum(code, found, other, n), met)
                    code.store_floats(value, n, to, self.output(conv.y, i, 0, start), count)

        code.loop("window", 0, conv.patch[1] // across, 1, column)

    def output(self, layout: Layout, a: int, b: int, start: int) -> int:
        """Element of the output `start` of the tile's pixel (a, b) after the block row's first at its first pixel."""
        plane, within = divmod(start, layout.block)
        return a * layout.line + b * layout.pixel + plane * layout.plane + within
