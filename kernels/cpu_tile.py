"""The CPU engine's micro-kernel, written as LLVM IR: a tile of pixels times the blocks of one block row.

Layouts, all dense: input `[N, H, W, C]`, output and residual `[N, P, Q, O]`, weights `[nnz, R, S, BC, BO]`,
`col_indices [nnz]` int32. The sums of `rows x columns` pixels times up to `Target.vectors` vectors of outputs
stay in registers while the blocks stream past:

    for each block, each kernel row r that meets the image, each of the S * BC inputs k of that row:
        load the weights of k, a vector or two; prefetch those 4 KB ahead
        for each pixel: broadcast its input k, multiply, add
    add the residual, apply the activation, store

Inputs of neighbouring taps of a kernel row are neighbours in memory too, so they form one run of k. For
bfloat16 a step takes k and k + 1: their weights are interleaved in registers for dot products of pairs. Where
a block is half a vector high, a step takes two k (or pairs) side by side in every lane's place: the weights
are interleaved, the input broadcasts two at once, and neighbouring lanes are added at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxdbsr.kernels.cpu_activation import activated
from fxdbsr.kernels.cpu_job import Job, sides
from fxdbsr.kernels.llvm import Code

_PREFETCH = 4096  # bytes ahead of the weights in use


def widths(job: Job, height: int) -> list[tuple[int, int]]:
    """(first output, outputs) of the parts of a block of that height that a micro-kernel computes at once."""
    most = job.target.vectors * job.target.lanes
    return [(start, min(most, height - start)) for start in range(0, height, most)]


def declarations(job: Job) -> list[str]:
    """Declarations of the intrinsics that micro-kernels call."""
    lines = ["declare void @llvm.prefetch.p0(ptr, i32, i32, i32)"]
    for n in (4, 8, 16):
        v = f"<{n} x float>"
        lines.append(f"declare {v} @llvm.fma.v{n}f32({v}, {v}, {v})")
        lines.append(f"declare {v} @llvm.rint.v{n}f32({v})")
        if job.bfloat16:
            lines.append(f"declare {v} {_DOT}{32 * n}({v}, <{2 * n} x bfloat>, <{2 * n} x bfloat>)")
    return lines


_DOT = "@llvm.x86.avx512bf16.dpbf16ps."


def tile(job: Job, width: int) -> str:
    """The function `@tile_{width}` for that many outputs of a block row.

    Its arguments: x, y, bias, residual at the tile's first pixel and output; `plane`, elements of x from a
    column of blocks to the next; `col`, `w` at the row's first block; n, its blocks; first, last + 1 of R.
    """
    return _Tile(job, width).write()


class _Tile:
    def __init__(self, job: Job, width: int) -> None:
        self.job, self.width, self.code = job, width, Code()
        self.pixels = [(a, b) for a in range(job.tile[0]) for b in range(job.tile[1])]
        self.line = job.panel[1] * job.block[1]  # elements of a panel row
        self.runs = self._runs()
        lanes, unit = job.target.lanes, 2 if job.bfloat16 else 1
        self.side = lanes // width if sides(job.target, width) and width == job.block[0] else 1
        self.side = self.side if job.block[1] % (self.side * unit) == 0 else 1  # k (or pairs) in a vector
        self.k_step = self.side * unit
        self.vectors = self._vectors() if self.side == 1 else [(0, lanes, lanes)]
        self.woven = job.bfloat16 and width == 2 * lanes == 32
        self.types = [f"<{n} x float>" for _ in self.pixels for _, n, _ in self.vectors]

    def _runs(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """(first, last + 1, pixels): taps of a kernel row side by side in memory, the pixels they meet.

        Where a tile spans its row of the image, taps that fall on the padding of a pixel are left out.
        """
        job, runs = self.job, list[tuple[int, int, tuple[int, ...]]]()
        for s in range(job.kernel[1]):
            met = tuple(range(len(self.pixels)))
            if not job.flat and job.tile[1] == job.out[1]:
                column = [b * job.stride[1] - job.padding[1] + s * job.dilation[1] for _, b in self.pixels]
                met = tuple(p for p in met if 0 <= column[p] < job.size[1])
            if runs and runs[-1][2] == met and job.dilation[1] == 1:
                runs[-1] = (runs[-1][0], s + 1, met)
            elif met:
                runs.append((s, s + 1, met))
        return runs

    def _vectors(self) -> list[tuple[int, int, int]]:
        """(first output, lanes, outputs) of the vectors that hold the tile's outputs."""
        vectors = []
        for start in range(0, self.width, self.job.target.lanes):
            count = min(self.job.target.lanes, self.width - start)
            vectors.append((start, max(4, 1 << (count - 1).bit_length()), count))
        return vectors

    def write(self) -> str:
        job, code = self.job, self.code
        first = ["zeroinitializer"] * len(self.vectors)
        if job.bias and self.side == 1 and not self.woven:
            first = [self._widened("%bias", start, n, count) for start, n, count in self.vectors]
        sums = self._loop("block", 0, "%n", 1, self._block, first * len(self.pixels))
        for p, (a, b) in enumerate(self.pixels):
            if self.woven:
                sums[2 * p : 2 * p + 2] = self._unwoven(*sums[2 * p : 2 * p + 2])
            for v, (start, n, count) in enumerate(self.vectors):
                offset = (a * job.out[1] + b) * job.channels[1] + start
                self._store(sums[p * len(self.vectors) + v], offset, start, n, count)
        pointers = ", ".join(f"ptr noalias %{name}" for name in ("x", "y", "bias", "residual", "col", "w"))
        return code.function(
            f"define internal void @tile_{self.width}({pointers}, i64 %plane, i64 %n, i64 %first, i64 %last)"
            " noinline nounwind"
        )

    def _loop(
        self,
        name: str,
        start: int | str,
        stop: int | str,
        step: int,
        body: Callable[..., list[str]],
        sums: Sequence[str],
    ) -> list[str]:
        """A loop that carries the sums; `body(i, sums)`."""
        carried = list(zip(self.types, sums, strict=True))
        return self.code.loop(name, start, stop, step, lambda i, *values: body(i, [*values]), carried)

    def _block(self, j: str, sums: list[str]) -> list[str]:
        job, code = self.job, self.code
        taps = job.kernel[0] * job.kernel[1]
        last = job.grid[1] - 1  # a wrong index must not read outside of x
        column = code.value(f"call i64 @llvm.umin.i64(i64 {code.index('%col', j)}, i64 {last})")
        x = code.at("%x", code.mul(column, "%plane"), job.element)
        w = code.at("%w", code.mul(j, taps * job.block[0] * job.block[1]), job.element)
        if job.kernel[0] == 1:
            return self._kernel_row(x, w, sums)

        def kernel_row(r: str, sums: list[str]) -> list[str]:
            at_x = code.at(x, code.mul(r, job.dilation[0] * self.line), job.element)
            at_w = code.at(w, code.mul(r, job.kernel[1] * job.block[0] * job.block[1]), job.element)
            return self._kernel_row(at_x, at_w, sums)

        return self._loop("row", "%first", "%last", 1, kernel_row, sums)

    def _kernel_row(self, x: str, w: str, sums: list[str]) -> list[str]:
        code, element, BC = self.code, self.job.element, self.job.block[1]
        for first, last, pixels in self.runs:
            at_x = code.at(x, first * self.job.dilation[1] * BC, element)
            at_w = code.at(w, first * BC * self.job.block[0], element)
            sums = self._run(at_x, at_w, (last - first) * BC, pixels, sums)
        return sums

    def _run(self, x: str, w: str, length: int, pixels: tuple[int, ...], sums: list[str]) -> list[str]:
        """The run of k at x and w for some pixels, unrolled where it divides."""
        code, element = self.code, self.job.element
        whole = length // self.k_step
        unroll = max(n for n in range(1, 5) if whole % n == 0) * self.k_step

        def steps(k: str, sums: list[str]) -> list[str]:
            at_w = code.at(w, code.mul(k, self.job.block[0]), element)
            return self._steps(code.at(x, k, element), at_w, range(0, unroll, self.k_step), unroll, pixels, sums)

        whole *= self.k_step
        sums = self._loop("k", 0, whole, unroll, steps, sums)
        return self._steps(x, w, range(whole, length, self.k_step), length, pixels, sums)

    def _steps(self, x: str, w: str, ks: range, end: int, pixels: tuple[int, ...], sums: list[str]) -> list[str]:
        """The steps at each of `ks`; a step past `end` takes only its first k."""
        code, sums = self.code, [*sums]
        row = self.job.block[0] * self.job.bytes
        down, right = self.job.pitches
        for k in ks:
            half = k + self.k_step > end
            for line in range(-(-k * row // 64) * 64, (k + self.k_step) * row, 64):
                far = code.at(w, line + _PREFETCH, "i8")
                code.emit(f"call void @llvm.prefetch.p0(ptr {far}, i32 0, i32 3, i32 1)")
            if self.woven:
                weights = self._woven(w, k, half)
            else:
                weights = [self._weights(w, k, start, n, count, half) for start, n, count in self.vectors]
            for p in pixels:
                a, b = self.pixels[p]
                offset = a * down + b * right + k
                inputs = {n: self._broadcast(x, offset, n, half) for n in dict.fromkeys(n for _, n, _ in self.vectors)}
                for v, (_, n, _) in enumerate(self.vectors):
                    i = p * len(self.vectors) + v
                    sums[i] = self._multiply(sums[i], inputs[n], weights[v], n)
        return sums

    def _woven(self, w: str, k: int, half: bool) -> list[str]:
        """Pairs for 32 outputs, each 8 outputs divided among both vectors: an instruction each, no index."""
        code, BO = self.code, self.job.block[0]
        first = code.load(code.at(w, k * BO, "i16"), "<32 x i16>", 2)
        second = "zeroinitializer" if half else code.load(code.at(w, (k + 1) * BO, "i16"), "<32 x i16>", 2)
        pairs = []
        for low in (0, 4):
            order = [32 * h + quad + low + o for quad in range(0, 32, 8) for o in range(4) for h in (0, 1)]
            both = self._shuffled("i16", first, second, 32, order)
            pairs.append(code.value(f"bitcast <32 x i16> {both} to <32 x bfloat>"))
        return pairs

    def _unwoven(self, low: str, high: str) -> list[str]:
        """The sums that `_woven` weights gave, in the order of outputs."""
        lanes = [16 * (o % 8 // 4) + o // 8 * 4 + o % 4 for o in range(32)]
        return [self._shuffled("float", low, high, 16, part) for part in (lanes[:16], lanes[16:])]

    def _weights(self, w: str, k: int, start: int, n: int, count: int, half: bool) -> str:
        """Weights of step k; for bfloat16 those of k and k + 1 of each output side by side."""
        job, code, BO = self.job, self.code, self.job.block[0]
        at = code.at(w, k * BO + start, job.element)
        if not job.bfloat16:
            raw = self._fitted("float", code.load(at, f"<{count} x float>", 4), count, n)
            order = [i * BO + o for o in range(BO) for i in range(self.side)]
            return raw if self.side == 1 else self._shuffled("float", raw, "poison", n, order)
        if n == self.side * BO and not half:
            both = code.load(at, f"<{2 * n} x i16>", 2)
            order = [i * BO + o for o in range(BO) for i in range(2 * self.side)]
            pairs = self._shuffled("i16", both, "poison", 2 * n, order)
        else:
            first = self._fitted("i16", code.load(at, f"<{count} x i16>", 2), count, n)
            second = "zeroinitializer"
            if not half:
                raw = code.load(code.at(at, BO, job.element), f"<{count} x i16>", 2)
                second = self._fitted("i16", raw, count, n)
            pairs = self._shuffled("i16", first, second, n, [h * n + o for o in range(n) for h in (0, 1)])
        return code.value(f"bitcast <{2 * n} x i16> {pairs} to <{2 * n} x bfloat>")

    def _broadcast(self, x: str, offset: int, n: int, half: bool) -> str:
        """Input k of a pixel in n lanes; for bfloat16 the pair; `side` of them side by side."""
        code, side, unit = self.code, self.side, "i32" if self.job.bfloat16 else "float"
        at = code.at(x, offset, self.job.element)
        if side > 1:
            words = code.load(at, f"<{side} x {unit}>", self.job.bytes)
        else:
            word = (
                f"zext i16 {code.load(at, 'i16', 2)} to i32"
                if half
                else f"load {unit}, ptr {at}, align {self.job.bytes}"
            )
            words = code.value(f"insertelement <1 x {unit}> poison, {unit} {code.value(word)}, i32 0")
        spread = self._shuffled(unit, words, "poison", side, [i % side for i in range(n)])
        return code.value(f"bitcast <{n} x i32> {spread} to <{2 * n} x bfloat>") if self.job.bfloat16 else spread

    def _multiply(self, sums: str, x: str, w: str, n: int) -> str:
        v, pairs = f"<{n} x float>", f"<{2 * n} x bfloat>"
        if self.job.bfloat16:
            return self.code.value(f"call {v} {_DOT}{32 * n}({v} {sums}, {pairs} {w}, {pairs} {x})")
        return self.code.value(f"call {v} @llvm.fma.v{n}f32({v} {x}, {v} {w}, {v} {sums})")

    def _store(self, value: str, offset: int, start: int, n: int, count: int) -> None:
        """Epilogue of one vector of sums: halves, residual, activation, store at y[offset]."""
        job, code = self.job, self.code
        if self.side > 1 or self.woven:
            while n > self.width:
                even, odd = (self._shuffled("float", value, "poison", n, range(i, n, 2)) for i in (0, 1))
                n //= 2
                value = code.value(f"fadd <{n} x float> {even}, {odd}")
            count = min(n, count)
            if job.bias:
                value = code.value(f"fadd <{n} x float> {value}, {self._widened('%bias', start, n, n)}")
        if job.residual:
            value = code.value(f"fadd <{n} x float> {value}, {self._widened('%residual', offset, n, count)}")
        value, kind = (
            self._fitted("float", activated(code, value, n, job.activation, job.negative_slope), n, count),
            "float",
        )
        if job.bfloat16:
            value, kind = code.value(f"fptrunc <{count} x float> {value} to <{count} x bfloat>"), "bfloat"
        to = code.at("%y", offset, job.element)
        code.emit(f"store <{count} x {kind}> {value}, ptr {to}, align {job.bytes}")

    def _widened(self, pointer: str, offset: int, n: int, count: int) -> str:
        """N float32 lanes from `count` elements at pointer[offset], the rest zero."""
        code = self.code
        raw = code.load(code.at(pointer, offset, self.job.element), f"<{count} x {self.job.element}>", self.job.bytes)
        if self.job.bfloat16:
            wide = code.value(f"zext <{count} x i16> {raw} to <{count} x i32>")
            wide = code.value(f"shl <{count} x i32> {wide}, <{', '.join(['i32 16'] * count)}>")
            raw = code.value(f"bitcast <{count} x i32> {wide} to <{count} x float>")
        return self._fitted("float", raw, count, n)

    def _fitted(self, type: str, value: str, count: int, n: int) -> str:
        """`value` of `count` lanes with n lanes: the first, or followed by zeros."""
        if count == n:
            return value
        return self._shuffled(type, value, "zeroinitializer", count, [min(i, count) for i in range(n)])

    def _shuffled(self, type: str, a: str, b: str, lanes: int, order: Sequence[int]) -> str:
        lane = ", ".join(f"i32 {i}" for i in order)
        v = f"<{lanes} x {type}>"
        return self.code.value(f"shufflevector {v} {a}, {v} {b}, <{len(order)} x i32> <{lane}>")
