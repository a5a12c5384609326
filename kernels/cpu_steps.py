"""The CPU engine's steps, written as LLVM IR: what one task of a conv, a copy or a pool does, and who does which.

A step is a function `@step(arguments, task)`; its tasks may be done in any order and by any thread. `arguments` is a
block of 64-bit integers: addresses, named in the step's tuple, and none of them written by the step but y's content.
`program` is the function that does all tasks of a list of steps, one step after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd

from fxdbsr.kernels import cpu_amx, cpu_tile
from fxdbsr.kernels.cpu_layout import Layout
from fxdbsr.kernels.cpu_tile import Conv
from fxdbsr.kernels.jit import Target
from fxdbsr.kernels.llvm import Code

CONV = ("x", "y", "residual", "bias", "w", "crow", "col", "rows", "lines", "tasks", "nnz")
TASK = ("image", "top", "bottom", "left", "right", "first", "last")
ROW = ("x", "y", "residual", "bias", "edge")
IMAGES = ("x", "y")
_INTRINSICS = """
declare i64 @llvm.smin.i64(i64, i64)
declare i64 @llvm.smax.i64(i64, i64)
declare i64 @llvm.umin.i64(i64, i64)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
"""


def _module(code: Code, arguments: Sequence[str], functions: Sequence[str] = (), declarations: Sequence[str] = ()) -> str:
    loads = Code()
    for i, name in enumerate(arguments):
        loads.emit(f"%{name} = load {'i64' if name == 'nnz' else 'ptr'}, ptr {loads.at('%arguments', i, 'i64')}")
    code.lines[:0] = [line.replace("%v.", "%argument.") for line in loads.lines]
    step = code.function("define void @step(ptr %arguments, i64 %task) nounwind")
    return "\n".join([_INTRINSICS, *declarations, *functions, step])


def conv_step(conv: Conv) -> str:
    """The step whose task is some tiles of an image by some block rows; arguments `CONV`.

    rows: int32 `ROW` for each block row: where its first output, and the first input of its group, lies in an image,
    whether it is the last row of a group; lines: int32, for each output row the first and last + 1 kernel row that
    meets the image in a tile from there; tasks: int32 `TASK` each, first and last + 1 of output rows, columns, block rows.
    """
    code, element = Code(), conv.element[0]
    image, top, bottom, left, right, first_row, last_row = (
        code.index("%tasks", code.add(code.mul("%task", len(TASK)), i)) for i in range(len(TASK))
    )
    x = code.at("%x", code.mul(image, conv.x.image), element)
    y = code.at("%y", code.mul(image, conv.y.image), element)
    residual = code.at("%residual", code.mul(image, conv.residual.image), element) if conv.residual else y
    height, width = conv.tile

    def block_row(row: str) -> None:
        stop = code.least(code.index("%crow", code.add(row, 1)), "%nnz")  # wrong indices must not read beyond
        start = code.least(code.index("%crow", row), stop)
        at = [code.index("%rows", code.add(code.mul(row, len(ROW)), i)) for i in range(len(ROW))]
        row_x, row_y, row_residual, row_bias = (
            code.at(pointer, offset, element) for pointer, offset in zip((x, y, residual, "%bias"), at, strict=False)
        )
        block = conv.order.block(conv.block[1], conv.kernel[0] * conv.kernel[1])
        w = code.at("%w", code.mul(start, block), conv.weight[0])
        row_start, n = code.at("%col", start, "i32"), code.op("sub", stop, start)

        def tiles(edge: bool) -> None:
            def line(a: str) -> None:
                a = code.least(a, conv.out[0] - height)
                first, last = (code.index("%lines", code.add(code.mul(a, 2), i)) for i in (0, 1))

                def one(b: str) -> None:
                    b = code.least(b, conv.out[1] - width)
                    at_x = code.add(code.mul(a, conv.stride[0] * conv.x.line), code.mul(b, conv.stride[1] * conv.x.pixel))
                    at_y, at_residual = (
                        code.add(code.mul(a, layout.line), code.mul(b, layout.pixel)) if layout else "0"
                        for layout in (conv.y, conv.residual)
                    )
                    pointers = [
                        code.at(pointer, offset, element)
                        for pointer, offset in ((row_x, at_x), (row_y, at_y), (row_residual, at_residual))
                    ]
                    given = ", ".join(f"ptr {p}" for p in (*pointers, row_bias, w, row_start))
                    for start, count in conv.parts(edge):
                        code.emit(f"call void @tile_{start}_{count}({given}, i64 {n}, i64 {first}, i64 {last})")

                code.loop("column", left, right, width, one)

            code.loop("line", top, bottom, height, line)

        if conv.edge == conv.block[0]:
            tiles(False)
        else:
            code.when(code.value(f"icmp ne i64 {at[4]}, 0"), partial(tiles, True), partial(tiles, False))

    code.loop("row", first_row, last_row, 1, block_row)
    parts = sorted({*conv.parts(False), *conv.parts(True)})
    vectors = [(f"<{n} x float>", f"<{2 * n} x bfloat>", n) for n in (4, 8, 16)]
    declarations = [f"declare {v} @llvm.{name}" for v, _, n in vectors for name in (f"fma.v{n}f32({v}, {v}, {v})", f"rint.v{n}f32({v})")]
    if conv.bfloat16:
        declarations += [f"declare {v} @llvm.x86.avx512bf16.dpbf16ps.{32 * n}({v}, {p}, {p})" for v, p, n in vectors]
    write = cpu_amx.tile if conv.order.tiles else cpu_tile.tile
    if conv.order.tiles:
        code.emit("call void @llvm.x86.tilerelease()")
        declarations += cpu_amx.DECLARATIONS
    return _module(code, CONV, [write(conv, *part) for part in parts], declarations)


@dataclass(frozen=True)
class Copy:
    """An image from one layout to another, the border and what fills up planes written as zeros."""

    target: Target
    bfloat16: bool
    x: Layout
    y: Layout

    def piece(self, most: int) -> tuple[int, int]:
        """(channels, number) of the pieces, side by side in both layouts, that channels are copied in from the first on."""
        x, y = self.x, self.y
        if x.groups > 1 or y.groups > 1:
            return 1, 0
        size = gcd(most, *(layout.block for layout in (x, y) if layout.block < x.channels))
        return size, x.channels // size


def copy_step(copy: Copy) -> str:
    """The step whose task is a row of y, border included, of an image; arguments `IMAGES`."""
    code, x, y = Code(), copy.x, copy.y
    element, most = ("i16", 2 * copy.target.lanes) if copy.bfloat16 else ("float", copy.target.lanes)
    (H, W), (top, left) = y.size, y.border
    image, row = code.op("udiv", "%task", H + 2 * top), code.op("urem", "%task", H + 2 * top)
    above = code.op("sub", row, top)
    from_ = code.at("%x", code.add(code.mul(image, x.image), code.add(code.mul(above, x.line), x.at(0))), element)
    to = code.at("%y", code.add(code.mul(image, y.image), code.mul(row, y.line)), element)

    def put(pointer: str, count: int, source: str | None) -> None:
        start = 0
        while start < count:
            n = min(most, 1 << ((count - start).bit_length() - 1))
            kind, value = f"<{n} x {element}>", "zeroinitializer"
            if source:
                value = code.load(code.at(source, start, element), kind, 1)
            code.emit(f"store {kind} {value}, ptr {code.at(pointer, start, element)}, align 1")
            start += n

    def column(b: str) -> None:
        pixel = code.at(to, code.mul(b, y.pixel), element)

        def inside() -> None:
            source = code.at(from_, code.mul(code.op("sub", b, left), x.pixel), element)
            for channel, count in y.runs():
                put(code.at(pixel, y.at(channel) - y.at(0), element), y.pixel, None) if count < y.pixel else None
            size, whole = copy.piece(most)

            def piece(i: str) -> None:
                at_x, at_y = (
                    code.add(
                        code.mul(code.op("udiv", i, layout.block // size), layout.plane),
                        code.mul(code.op("urem", i, layout.block // size), size),
                    )
                    for layout in (x, y)
                )
                put(code.at(pixel, at_y, element), size, code.at(source, at_x, element))

            code.loop("piece", 0, whole, 1, piece)
            for start in range(whole * size, x.channels) if whole * size < x.channels else ():
                at_x, at_y = (layout.at(start) - layout.at(0) for layout in (x, y))
                put(code.at(pixel, at_y, element), 1, code.at(source, at_x, element))

        def outside() -> None:
            for channel, _ in y.runs():
                put(code.at(pixel, y.at(channel) - y.at(0), element), y.pixel, None)

        if y.border == (0, 0):
            inside()
        else:
            within = [code.value(f"icmp ult i64 {i}, {n}") for i, n in ((above, H), (code.op("sub", b, left), W))]
            code.when(code.value(f"and i1 {within[0]}, {within[1]}"), inside, outside)

    code.loop("column", 0, W + 2 * left, 1, column)
    return _module(code, IMAGES)


@dataclass(frozen=True)
class Pool:
    """The largest or the mean of the pixels in windows; sizes and steps are (rows, columns).

    Args:
        kind: "max", over what lies in the image, or "mean", unpadded.
        out: (P, Q).
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

    top, bottom = window(a, 0)

    def column(b: str) -> None:
        left, right = window(b, 1)
        pixel = code.at(to, code.mul(b, y.pixel), element)

        def piece(plane: str, start: str | int, count: int) -> None:
            n = max(4, 1 << (count - 1).bit_length())
            vector = f"<{n} x float>"
            source = code.at(from_, code.add(code.mul(plane, x.plane), start), element)

            def one(h: str, w: str, found: str) -> list[str]:
                at = code.at(source, code.add(code.mul(h, x.line), code.mul(w, x.pixel)), element)
                value = code.floats(at, 0, n, count, pool.bfloat16)
                if pool.kind == "mean":
                    return [code.value(f"fadd {vector} {found}, {value}")]
                larger = code.value(f"fcmp ogt {vector} {value}, {found}")
                odd = code.value(f"fcmp uno {vector} {value}, {value}")
                take = code.value(f"or <{n} x i1> {larger}, {odd}")
                return [code.value(f"select <{n} x i1> {take}, {vector} {value}, {vector} {found}")]

            def row(h: str, found: str) -> list[str]:
                return code.loop("w", left, right, 1, lambda w, found: one(h, w, found), [(vector, found)])

            least = f"<{', '.join(['float 0xFFF0000000000000'] * n)}>"
            first = "zeroinitializer" if pool.kind == "mean" else least
            (found,) = code.loop("h", top, bottom, 1, row, [(vector, first)])
            if pool.kind == "mean":
                area = [f"float {float(pool.kernel[0] * pool.kernel[1])!r}"] * n
                found = code.value(f"fdiv {vector} {found}, <{', '.join(area)}>")
            to_y = code.at(pixel, code.add(code.mul(plane, y.plane), start), element)
            code.store_floats(found, n, to_y, 0, count, pool.bfloat16)

        def planes(plane: str) -> None:
            whole = x.block // lanes * lanes
            code.loop("piece", 0, whole, lanes, lambda start: piece(plane, start, lanes))
            if whole < x.block:
                piece(plane, whole, x.block - whole)

        code.loop("plane", 0, -(-x.channels // x.block), 1, planes)

    code.loop("column", 0, pool.out[1], 1, column)
    return _module(code, IMAGES)


def program(parallel: bool) -> str:
    """The module whose `@run(steps, count, counters, threads)` does all tasks of `count` steps.

    steps: (function, arguments, tasks) each. A thread does its share of a step's tasks, then what others have left,
    then waits for all. counters: `count * threads` groups of 64 bytes, the first 8 of each zero.
    """
    code = Code()

    def step(i: str) -> None:
        at = code.at("%steps", code.mul(i, 3), "i64")
        function, arguments = code.load(at, "ptr", 8), code.load(code.at(at, 1, "i64"), "ptr", 8)
        tasks = code.load(code.at(at, 2, "i64"), "i64", 8)

        def share(turn: str) -> None:
            owner = code.op("urem", code.add("%thread", turn), "%members")
            first, last = (code.op("udiv", code.mul(o, tasks), "%members") for o in (owner, code.add(owner, 1)))
            counter = code.at("%counters", code.mul(code.add(code.mul(i, "%members"), owner), 8), "i64")
            size, name = code.op("sub", last, first), code.fresh("share")
            code.label(f"{name}.next")
            task = code.value(f"atomicrmw add ptr {counter}, i64 1 monotonic")
            code.emit(f"br i1 {code.value(f'icmp ult i64 {task}, {size}')}, label %{name}.do, label %{name}.end")
            code.start(f"{name}.do")
            code.emit(f"call void {function}(ptr {arguments}, i64 {code.add(first, task)})")
            code.emit(f"br label %{name}.next")
            code.start(f"{name}.end")

        code.loop("turn", 0, "%members", 1, share)
        if parallel:
            many = code.value("icmp ugt i64 %members, 1")
            code.when(many, lambda: code.emit("call void @fxdbsr_barrier()"))

    code.loop("step", 0, "%count", 1, step)
    work = code.function("define internal void @work(ptr %steps, i64 %count, ptr %counters, i64 %thread, i64 %members)")
    return "\n".join([_PARALLEL, work] if parallel else [_SERIAL, work])


_SERIAL = """
define void @run(i64 %s, i64 %count, i64 %c, i64 %threads) nounwind {
  %steps = inttoptr i64 %s to ptr
  %counters = inttoptr i64 %c to ptr
  %size = mul i64 %count, 64
  call void @llvm.memset.p0.i64(ptr %counters, i8 0, i64 %size, i1 false)
  call void @work(ptr %steps, i64 %count, ptr %counters, i64 0, i64 1)
  ret void
}
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
"""
_PARALLEL = """
define void @run(i64 %s, i64 %count, i64 %c, i64 %threads) nounwind {
  %steps = inttoptr i64 %s to ptr
  %counters = inttoptr i64 %c to ptr
  %groups = mul i64 %count, %threads
  %size = mul i64 %groups, 64
  call void @llvm.memset.p0.i64(ptr %counters, i8 0, i64 %size, i1 false)
  %many = icmp sgt i64 %threads, 1
  br i1 %many, label %team, label %alone
team:
  %block = alloca [3 x i64]
  %at.count = getelementptr i64, ptr %block, i64 1
  %at.counters = getelementptr i64, ptr %block, i64 2
  store i64 %s, ptr %block
  store i64 %count, ptr %at.count
  store i64 %c, ptr %at.counters
  %n = trunc i64 %threads to i32
  call void @fxdbsr_parallel(ptr @member, ptr %block, i32 %n, i32 0)
  ret void
alone:
  call void @work(ptr %steps, i64 %count, ptr %counters, i64 0, i64 1)
  ret void
}
define internal void @member(ptr %block) nounwind {
  %at.count = getelementptr i64, ptr %block, i64 1
  %at.counters = getelementptr i64, ptr %block, i64 2
  %steps = load ptr, ptr %block
  %count = load i64, ptr %at.count
  %counters = load ptr, ptr %at.counters
  %thread = call i32 @fxdbsr_thread()
  %members = call i32 @fxdbsr_threads()
  %i = zext i32 %thread to i64
  %n = zext i32 %members to i64
  call void @work(ptr %steps, i64 %count, ptr %counters, i64 %i, i64 %n)
  ret void
}
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare void @fxdbsr_parallel(ptr, ptr, i32, i32)
declare i32 @fxdbsr_thread()
declare i32 @fxdbsr_threads()
declare void @fxdbsr_barrier()
"""
