"""The CPU engine's steps, written as LLVM IR, and that of a conv: what one of its tasks does.

A step is the function `@step(arguments, task)` of a module. Its tasks may be done in any order and by any threads.
`arguments` is a block of 64-bit integers, addresses but for the last of a conv; nobody writes to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fxdbsr.kernels import cpu_amx, cpu_tile
from fxdbsr.kernels.cpu_conv import Conv
from fxdbsr.kernels.llvm import Code, module

CONV = ("x", "y", "residual", "bias", "w", "crow", "col", "rows", "lines", "tasks", "nnz")
TASK = ("image", "top", "bottom", "left", "right", "first", "last")
ROW = ("x", "y", "residual", "bias", "edge")


def step(code: Code, arguments: Sequence[str], others: Sequence[str] = ()) -> str:
    """The module of a step whose body is `code`; `others` are the functions that it calls."""
    loads = Code()
    for i, name in enumerate(arguments):
        loads.emit(f"%{name} = load {'i64' if name == 'nnz' else 'ptr'}, ptr {loads.at('%arguments', i, 'i64')}")
    code.lines[:0] = [line.replace("%v.", "%argument.") for line in loads.lines]
    return module(*others, code.function("define void @step(ptr %arguments, i64 %task) nounwind"))


def conv_step(conv: Conv) -> str:
    """The step whose task is some tiles of an image for some block rows; arguments `CONV`.

    Args:
        conv: what the code knows. Its tables, int32: tasks, `TASK` each: first and last + 1 output row, column and
            block row; rows, `ROW` for each block row: where its first output and its group's first input lie in an
            image, whether it is the last row of a group; lines, for each output row: first and last + 1 kernel row
            that meets the image in a tile that starts there.
    """
    code = Code(conv.bfloat16)
    if conv.written is not conv.y:
        code.emit(f"%patch = alloca [{conv.written.image * code.bytes} x i8], align 64")
    image, top, bottom, left, right, first_row, last_row = (
        code.index("%tasks", code.add(code.mul("%task", len(TASK)), i)) for i in range(len(TASK))
    )
    layouts = {"x": conv.x, "y": conv.y, "residual": conv.residual}
    images = [
        code.at(f"%{name}", code.mul(image, layout.image)) if layout else "%y" for name, layout in layouts.items()
    ]

    def block_row(row: str) -> None:
        stop = code.least(code.index("%crow", code.add(row, 1)), "%nnz")  # wrong indices must not read beyond
        start = code.least(code.index("%crow", row), stop)
        *offsets, edge = (code.index("%rows", code.add(code.mul(row, len(ROW)), i)) for i in range(len(ROW)))
        *pointers, bias = (code.at(at, i) for at, i in zip([*images, "%bias"], offsets, strict=True))
        block = conv.order.block(conv.block[1], conv.kernel[0] * conv.kernel[1])
        w, col = code.at("%w", code.mul(start, block), conv.weight[0]), code.at("%col", start, "i32")
        fixed = [f"ptr {bias}", f"ptr {w}", f"ptr {col}", f"i64 {code.op('sub', stop, start)}"]
        tiles = partial(_tiles, code, conv, (top, bottom, left, right), pointers, fixed)
        if conv.edge == conv.block[0]:
            tiles(False)
        else:
            code.when(code.value(f"icmp ne i64 {edge}, 0"), partial(tiles, True), partial(tiles, False))

    code.loop("row", first_row, last_row, 1, block_row)
    if conv.order.tiles:
        code.call("void", "llvm.x86.tilerelease")
    write = cpu_amx.tile if conv.order.tiles else cpu_tile.tile
    parts = sorted({*conv.parts(False), *conv.parts(True)})
    codes = dict.fromkeys((conv, conv.last))
    return step(code, CONV, [write(of, *part) for of in codes for part in parts])


def _tiles(
    code: Code, conv: Conv, window: tuple[str, str, str, str], pointers: list[str], fixed: list[str], edge: bool
) -> None:
    """Call the micro-kernels for the tiles of a window of outputs (top, bottom, left, right); pool what they write."""
    top, bottom, left, right = window
    steps = [(layout.line, layout.pixel) if layout else (0, 0) for layout in (conv.x, conv.y, conv.residual)]
    steps[0] = conv.stride[0] * steps[0][0], conv.stride[1] * steps[0][1]

    parts, pools = conv.parts(edge), conv.written is not conv.y

    def at(pointer: str, a: str, b: str, steps: tuple[int, int]) -> str:
        return code.at(pointer, code.add(code.mul(a, steps[0]), code.mul(b, steps[1])))

    def line(conv: Conv, a: str) -> None:
        lines = [code.add(a, i) for i in range(0, conv.patch[0], conv.tile[0])]
        meets = [[code.index("%lines", code.add(code.mul(line, 2), i)) for i in (0, 1)] for line in lines]

        def place(b: str) -> None:
            b = code.least(b, conv.out[1] - conv.tile[1])
            for i, (line, meet) in enumerate(zip(lines, meets, strict=True)):
                places = [at(pointer, line, b, s) for pointer, s in zip(pointers, steps, strict=True)]
                if pools:
                    places[1] = code.at("%patch", i * conv.tile[0] * conv.written.line)
                given = ", ".join([*(f"ptr {p}" for p in places), *fixed, *(f"i64 {m}" for m in meet)])
                for start, count in parts:
                    code.emit(f"call void @tile_{conv.tile[0]}_{start}_{count}({given})")
            if pools:
                window = [code.op("udiv", i, size) for i, size in zip((a, b), conv.pool, strict=True)]
                y = at(pointers[1], window[0], window[1], (conv.y.line, conv.y.pixel))
                for start, count in parts:
                    cpu_tile.Tile(conv, start, count).pool(code, "%patch", y)

        code.loop("column", left, right, conv.tile[1], place)

    def lines(a: str) -> None:
        before = conv.out[0] - conv.patch[0]
        if conv.last is conv:
            return line(conv, code.least(a, before))
        return code.when(code.value(f"icmp sle i64 {a}, {before}"), partial(line, conv, a), partial(line, conv.last, a))

    code.loop("line", top, bottom, conv.patch[0], lines)
