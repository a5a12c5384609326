"""The CPU engine's micro-kernel, written as LLVM IR: a tile of pixels times the blocks of one block row.

The sums of `rows x columns` pixels times a few vectors of outputs stay in registers while the blocks stream past:

    prefetch the lines of the outputs
    for each block, each kernel row r that meets the image, each kernel column s, each unit of inputs k:
        load the weights of k, a vector or two; prefetch those that come 4 KB later
        for each pixel: broadcast its inputs k, multiply, add
    add bias and residual, apply the activation, store

Layouts are those of `cpu_layout`: a pixel's inputs of a block are neighbours in memory, and where planes are as wide
as blocks, those of neighbouring kernel columns follow, so that a kernel row is one run of k. A unit is one input, or
a pair of bfloat16, for each of the sums of an output; sums side by side are added at the end. Where a vector spans
several groups, its lanes take the inputs of their own groups from one load.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from fxdbsr.kernels.cpu_layout import Layout, Order
from fxdbsr.kernels.jit import Target
from fxdbsr.kernels.llvm import Code

_PREFETCH = 4096  # bytes ahead of the weights in use
_DOT = "@llvm.x86.avx512bf16.dpbf16ps."


@dataclass(frozen=True)
class Conv:
    """All that the code of a conv knows; sizes and steps are (rows, columns).

    Args:
        target: what the code is for.
        bfloat16: dtype of every tensor; float32 otherwise.
        block: (outputs, inputs) of a block.
        order: of the weights in a block.
        group: (outputs, inputs) of a group.
        kernel, stride, padding, dilation: as in nn.Conv2d.
        x, y, residual: layouts of one image.
        out: (P, Q), the outputs that tiles are cut from.
        tile: (rows, columns) of pixels.
        edge: outputs of the last block row of a group.
        bias: there is one.
        activation, negative_slope: of the epilogue.
    """

    target: Target
    bfloat16: bool
    block: tuple[int, int]
    order: Order
    group: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    x: Layout
    y: Layout
    residual: Layout | None
    out: tuple[int, int]
    tile: tuple[int, int]
    edge: int
    bias: bool
    activation: str
    negative_slope: float

    @property
    def element(self) -> tuple[str, int]:
        """(IR type that an element is copied with, bytes)."""
        return ("i16", 2) if self.bfloat16 else ("float", 4)

    @property
    def weight(self) -> tuple[str, int]:
        """(IR type of a weight, bytes)."""
        return ("float", 4) if self.order.spread else self.element

    @property
    def inputs(self) -> int:
        """Inputs of a block, filled up to whole units."""
        return -(-self.block[1] // self.order.unit) * self.order.unit

    def parts(self, edge: bool) -> list[tuple[int, int]]:
        """(first, number) of the outputs that a micro-kernel computes at once, of a block row or of the edge one."""
        most = self.target.vectors * self.target.lanes
        whole = self.edge if edge else self.block[0]
        return [(start, min(most, whole - start)) for start in range(0, whole, most)]


def declarations(conv: Conv) -> list[str]:
    """Declarations of the intrinsics that micro-kernels call."""
    lines = ["declare void @llvm.prefetch.p0(ptr, i32, i32, i32)"]
    for n in (4, 8, 16):
        v, pairs = f"<{n} x float>", f"<{2 * n} x bfloat>"
        lines.append(f"declare {v} @llvm.fma.v{n}f32({v}, {v}, {v})")
        lines.append(f"declare {v} @llvm.rint.v{n}f32({v})")
        if conv.bfloat16:
            lines.append(f"declare {v} {_DOT}{32 * n}({v}, {pairs}, {pairs})")
    return lines


def tile(conv: Conv, start: int, count: int) -> str:
    """The function `@tile_{start}_{count}`: `count` outputs of a block row from `start` on.

    Its arguments: x, y, residual at the tile's first pixel, y, residual, bias at the block row's first output; w, col
    at its first block; n, its blocks; first, last + 1 of the kernel rows to meet.
    """
    return Tile(conv, start, count).write()


class Tile:
    """The writer of one micro-kernel."""

    def __init__(self, conv: Conv, start: int, count: int) -> None:
        self.conv, self.start, self.count, self.code = conv, start, count, Code()
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
        conv, size = self.conv, self.conv.element[1]
        for a, b in self.pixels:
            self._prefetch("%y", self._output(conv.y, a, b, self.start) * size, self.count * size, for_writing=True)
        first = ["zeroinitializer"] * len(self.vectors)
        if conv.bias and conv.order.sums == 1:
            first = [self.code.floats("%bias", start, n, count, conv.bfloat16) for start, n, count in self.vectors]
        sums = iter(self._loop("block", 0, "%n", 1, self._block, first * len(self.pixels)))
        for a, b in self.pixels:
            for vector in self.vectors:
                self._store(next(sums), a, b, *vector)
        return self._function()

    def _function(self) -> str:
        pointers = ", ".join(f"ptr noalias %{name}" for name in ("x", "y", "residual", "bias", "w", "col"))
        head = f"define internal void @tile_{self.start}_{self.count}({pointers}, i64 %n, i64 %first, i64 %last)"
        return self.code.function(f"{head} noinline nounwind")

    def _prefetch(self, pointer: str, first: int, size: int, for_writing: bool = False) -> None:
        """Fetch the lines that start in `size` bytes from byte `first` on."""
        for line in range(first, first + size, 64):
            at = self.code.at(pointer, line, "i8")
            self.code.emit(f"call void @llvm.prefetch.p0(ptr {at}, i32 {int(for_writing)}, i32 3, i32 1)")

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
            column = code.value(f"call i64 @llvm.umin.i64(i64 {code.index('%col', j)}, i64 {last})")
            plane, within = code.op("udiv", column, conv.x.block // BC), code.op("urem", column, conv.x.block // BC)
            x = code.at("%x", code.add(code.mul(plane, conv.x.plane), code.mul(within, BC)), conv.element[0])
        block = conv.order.block(BC, R * S)
        w = code.at("%w", code.mul(j, block), conv.weight[0])

        def kernel_row(r: str, sums: list[str]) -> list[str]:
            at_x = code.at(x, code.mul(r, conv.dilation[0] * conv.x.line), conv.element[0])
            at_w = code.at(w, code.mul(r, block // R), conv.weight[0])
            for first, taps, pixels in self._runs():
                run_x = code.at(at_x, first * conv.dilation[1] * conv.x.pixel, conv.element[0])
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
            at_x = code.at(x, code.mul(i, order.unit), conv.element[0])
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
        code, order, (element, size) = self.code, self.conv.order, self.conv.element
        kind = "float" if order.unit == 1 else f"i{8 * size * order.unit}"
        raw = code.load(code.at(x, at + i * order.unit, element), kind, size)
        one = code.value(f"insertelement <1 x {kind}> poison, {kind} {raw}, i32 0")
        spread = self.code.shuffle(kind, one, "poison", 1, [0] * n)
        return spread if order.unit == 1 else code.value(f"bitcast <{n} x {kind}> {spread} to {self._vector(n)}")

    def _spread(self, x: str, at: int, i: int, start: int, n: int) -> str:
        """Input i (counted over the taps) of each lane's own group."""
        outputs, inputs = self.conv.group
        first = start // outputs * inputs
        lanes = [(start + lane) // outputs * inputs + i - first for lane in range(n)]
        count = ((start + n - 1) // outputs + 1) * inputs - first
        loaded = self.code.floats(x, at + first, count, count, self.conv.bfloat16)
        return self.code.shuffle("float", loaded, "poison", count, lanes)

    def _multiply(self, sums: str, x: str, w: str, n: int) -> str:
        code, n = self.code, n * self.conv.order.sums
        v, pairs = f"<{n} x float>", f"<{2 * n} x bfloat>"
        if self.conv.bfloat16 and not self.conv.order.spread:
            return code.value(f"call {v} {_DOT}{32 * n}({v} {sums}, {pairs} {w}, {pairs} {x})")
        return code.value(f"call {v} @llvm.fma.v{n}f32({v} {x}, {v} {w}, {v} {sums})")

    def _store(self, value: str, a: int, b: int, start: int, n: int, count: int) -> None:
        """Epilogue of one vector of sums of the pixel (a, b), and its store in the planes that it belongs to."""
        conv, code = self.conv, self.code
        sums = conv.order.sums
        while sums > 1:
            even, odd = (self.code.shuffle("float", value, "poison", n * sums, range(i, n * sums, 2)) for i in (0, 1))
            sums //= 2
            value = code.value(f"fadd <{n * sums} x float> {even}, {odd}")
        if conv.bias and (conv.order.sums > 1 or conv.order.tiles):
            value = code.value(
                f"fadd <{n} x float> {value}, {self.code.floats('%bias', start, n, count, conv.bfloat16)}"
            )
        if conv.residual is not None:
            residual = self.code.floats("%residual", self._output(conv.residual, a, b, start), n, count, conv.bfloat16)
            value = code.value(f"fadd <{n} x float> {value}, {residual}")
        value = activated(code, value, n, conv.activation, conv.negative_slope)
        code.store_floats(value, n, "%y", self._output(conv.y, a, b, start), count, conv.bfloat16)

    def _output(self, layout: Layout, a: int, b: int, start: int) -> int:
        """Element of the output `start` of the tile's pixel (a, b) after the block row's first at its first pixel."""
        plane, within = divmod(start, layout.block)
        return a * layout.line + b * layout.pixel + plane * layout.plane + within


def activated(code: Code, value: str, n: int, activation: str, negative_slope: float) -> str:
    """`value`, n lanes of float32, through the activation."""
    vector = f"<{n} x float>"

    def constant(x: float) -> str:
        return f"<{', '.join([f'float {_literal(x)}'] * n)}>"

    def clip(value: str, keep: str, bound: float, other: str | None = None) -> str:
        kept = code.value(f"fcmp {keep} {vector} {value}, {constant(bound)}")
        return code.value(f"select <{n} x i1> {kept}, {vector} {value}, {vector} {other or constant(bound)}")

    def bound(value: str, limit: float, beyond: str) -> str:
        """The limit where it lies `beyond` the value, which NaN never does: one instruction on x86."""
        crossed = code.value(f"fcmp {beyond} {vector} {constant(limit)}, {value}")
        return code.value(f"select <{n} x i1> {crossed}, {vector} {constant(limit)}, {vector} {value}")

    def plus_product(a: str, b: str | float, c: str | float) -> str:
        b, c = (constant(t) if isinstance(t, float) else t for t in (b, c))
        return code.value(f"call {vector} @llvm.fma.v{n}f32({vector} {a}, {vector} {b}, {vector} {c})")

    def one_plus_exp_minus(value: str) -> str:
        """1 + exp(-value), infinite for NaN: 2^n times a polynomial of the rest (Cephes, expf)."""
        negative = code.value(f"fneg {vector} {value}")
        x = clip(clip(negative, "olt", 89.0), "ogt", -87.0)
        scaled = code.value(f"fmul {vector} {x}, {constant(1.44269504088896341)}")
        whole = code.value(f"call {vector} @llvm.rint.v{n}f32({vector} {scaled})")
        rest = plus_product(whole, 2.12194440e-4, plus_product(whole, -0.693359375, x))
        sum_ = constant(1.9875691500e-4)
        for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            sum_ = plus_product(sum_, rest, term)
        sum_ = plus_product(plus_product(sum_, rest, 1.0), rest, 1.0)
        power = code.value(f"fptosi {vector} {whole} to <{n} x i32>")
        power = code.value(f"add <{n} x i32> {power}, <{', '.join(['i32 127'] * n)}>")
        power = code.value(f"shl <{n} x i32> {power}, <{', '.join(['i32 23'] * n)}>")
        return plus_product(sum_, code.value(f"bitcast <{n} x i32> {power} to {vector}"), 1.0)

    match activation:
        case "relu":
            return bound(value, 0.0, "ogt")
        case "relu6":
            return bound(bound(value, 0.0, "ogt"), 6.0, "olt")
        case "leaky_relu":
            below = code.value(f"fmul {vector} {value}, {constant(negative_slope)}")
            return clip(value, "ugt", 0.0, below)
        case "hardswish":
            gate = bound(code.value(f"fadd {vector} {value}, {constant(3.0)}"), 0.0, "ogt")
            product = code.value(f"fmul {vector} {value}, {bound(gate, 6.0, 'olt')}")
            return code.value(f"fdiv {vector} {product}, {constant(6.0)}")
        case "silu":
            return code.value(f"fdiv {vector} {value}, {one_plus_exp_minus(value)}")
        case "sigmoid":
            gate = code.value(f"fdiv {vector} {constant(1.0)}, {one_plus_exp_minus(value)}")
            return clip(value, "uno", 0.0, gate)
    return value


def _literal(x: float) -> str:
    """The float32 nearest to x, as IR writes it."""
    (single,) = struct.unpack("<f", struct.pack("<f", x))
    return f"0x{struct.unpack('<Q', struct.pack('<d', single))[0]:016X}"
