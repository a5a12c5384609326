"""The CPU engine's driver, written as LLVM IR: shares out the work, packs the input, calls the micro-kernel.

A task is a panel of pixels times a group of block rows; the groups hold about equally many weights, and each
thread takes an equal, contiguous share of the tasks. Where the conv is flat a panel is a run of pixels, else
some output rows of an image. If the job packs, the thread first copies the panel's input, zero padded, to its
own scratch `[groups, columns of blocks, panel rows, panel columns, BC]`.

The last tile of a panel or row moves back to end with it rather than use masks: a pixel may be computed
twice, with the same result, for every sum runs over its blocks in order whatever the tile or the threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fxdbsr.kernels.cpu_job import Job
from fxdbsr.kernels.cpu_tile import declarations, tile, widths
from fxdbsr.kernels.llvm import Code

POINTERS = ("x", "y", "bias", "residual", "w", "crow", "col", "scratch")
ARGUMENTS = (*POINTERS, "nnz", "batch", "panels", "panel", "groups", "threads")

_ROW_COST = 8  # the work of starting a block row, in inputs k
_Call = Callable[[str, str, str, str], None]


def module(job: Job) -> str:
    """The module of `job`. Its `@run` takes the 64-bit integers `ARGUMENTS`.

    batch: images, if flat all their pixels; panels: of an image, if flat of the batch; panel: pixels that
    scratch has room for if flat; groups: of block rows; threads: how many may work, each with a scratch of
    `scratch_elements`.
    """
    heights = {job.block[0] if job.grid[0] > 1 else job.edge, job.edge}
    parts = sorted({width for height in heights for _, width in widths(job, height)})
    functions = [tile(job, width) for width in parts]
    intrinsics = [f"declare i64 @llvm.{name}.i64(i64, i64)" for name in ("smin", "smax", "umin")]
    return "\n".join([*intrinsics, *declarations(job), *functions, _Driver(job).write(), _entry(job)])


def scratch_elements(job: Job, panel: int) -> int:
    """Elements of scratch that a thread needs; `panel`: pixels of a panel where flat."""
    area = panel if job.flat else job.panel[0] * job.panel[1]
    return area * job.block[1] * job.grid[1] * job.groups if job.pack else 0


def _entry(job: Job) -> str:
    """`@run`: the arguments as a block in memory, shared by all threads."""
    lines = [f"define void @run({', '.join(f'i64 %{name}' for name in ARGUMENTS)}) nounwind {{"]
    lines.append(f"  %block = alloca [{len(ARGUMENTS)} x i64]")
    for i, name in enumerate(ARGUMENTS):
        lines.append(f"  %at.{name} = getelementptr i64, ptr %block, i64 {i}")
        lines.append(f"  store i64 %{name}, ptr %at.{name}")
    if job.parallel:
        lines += [
            "  %many = icmp sgt i64 %threads, 1",
            "  br i1 %many, label %team, label %alone",
            "team:",
            "  %n = trunc i64 %threads to i32",
            "  call void @fxdbsr_parallel(ptr @member, ptr %block, i32 %n, i32 0)",
            "  ret void",
            "alone:",
        ]
    lines += ["  call void @work(ptr %block, i64 0, i64 1)", "  ret void", "}"]
    if job.parallel:
        lines += [
            "declare void @fxdbsr_parallel(ptr, ptr, i32, i32)",
            "declare i32 @fxdbsr_thread()",
            "declare i32 @fxdbsr_threads()",
            "define internal void @member(ptr %block) nounwind {",
            "  %thread = call i32 @fxdbsr_thread()",
            "  %threads = call i32 @fxdbsr_threads()",
            "  %i = zext i32 %thread to i64",
            "  %n = zext i32 %threads to i64",
            "  call void @work(ptr %block, i64 %i, i64 %n)",
            "  ret void",
            "}",
        ]
    return "\n".join([*lines, ""])


class _Driver:
    def __init__(self, job: Job) -> None:
        self.job, self.code = job, Code()
        self.group_in = job.channels[0] // job.groups
        self.group_out = job.channels[1] // job.groups
        self.rows = job.grid[0] * job.groups
        self.scratch, self.plane = "%scratch", str(job.panel[0] * job.panel[1] * job.block[1])

    def write(self) -> str:
        code, job = self.code, self.job
        for i, name in enumerate(ARGUMENTS):
            at = code.at("%block", i, "i64")
            code.emit(f"%{name} = load {'ptr' if name in POINTERS else 'i64'}, ptr {at}")
        if not job.pack:
            self.plane = str(job.block[1])
        elif job.flat:
            self.plane = code.mul("%panel", job.block[1])
        if job.pack:
            mine = code.mul(code.mul("%thread", self.plane), job.grid[1] * job.groups)
            self.scratch = code.at("%scratch", mine, job.element)
        tasks = code.mul("%panels" if job.flat else code.mul("%batch", "%panels"), "%groups")
        first, last = (code.op("sdiv", code.mul(i, tasks), "%members") for i in ("%thread", code.add("%thread", 1)))
        code.loop("task", first, last, 1, self._task, [("i64", "-1")])
        return code.function("define internal void @work(ptr %block, i64 %thread, i64 %members) nounwind")

    def _task(self, task: str, packed: str) -> list[str]:
        """Panel `task / groups` with group `task % groups`; `packed` is the panel in scratch."""
        code = self.code
        panel, group = code.op("sdiv", task, "%groups"), code.op("srem", task, "%groups")
        pack, x, tiles = self._flat(panel) if self.job.flat else self._image(panel)
        if self.job.pack:
            code.when(code.value(f"icmp ne i64 {panel}, {packed}"), pack)
        first, last = self._boundary(group), self._boundary(code.add(group, 1))
        code.loop("row", first, last, 1, lambda row: self._row(row, x, tiles))
        return [panel]

    def _boundary(self, group: str) -> str:
        """The first block row of a group: about group / groups of the work lies before it."""
        code = self.code
        weight = self.job.kernel[0] * self.job.kernel[1] * self.job.block[1]
        total = code.add(code.mul(code.index("%crow", self.rows), weight), self.rows * _ROW_COST)
        goal = code.op("sdiv", code.mul(code.mul(group, 2), total), "%groups")

        def count(row: str, rows: str) -> list[str]:
            blocks = code.add(code.index("%crow", row), code.index("%crow", code.add(row, 1)))
            middle = code.add(code.mul(blocks, weight), code.mul(code.add(code.mul(row, 2), 1), _ROW_COST))
            before = code.value(f"icmp slt i64 {middle}, {goal}")
            return [code.add(rows, code.value(f"zext i1 {before} to i64"))]

        return code.loop("boundary", 0, self.rows, 1, count, [("i64", "0")])[0]

    def _share(self, panel: str, tiles: str | int, size: int) -> tuple[str, str]:
        """The share of a panel in that many tiles, as even as can be: first, last + 1 of `size` a tile."""
        first, last = (
            self.code.op("sdiv", self.code.mul(i, tiles), "%panels") for i in (panel, self.code.add(panel, 1))
        )
        return self.code.mul(first, size), self.code.mul(last, size)

    def _flat(self, panel: str) -> tuple[Callable[[], None], str, Callable[[_Call], None]]:
        """How to pack the panel, where its input lies, and its tiles."""
        code, job, width = self.code, self.job, self.job.tile[1]
        start, stop = self._share(panel, code.op("sdiv", code.add("%batch", width - 1), width), width)
        stop = code.least(stop, "%batch")
        start = code.least(start, code.op("sub", "%batch", width))
        count = code.op("sub", stop, start)
        source = code.at("%x", code.mul(start, job.channels[0]), job.element)

        def pack() -> None:
            def pixel(i: str) -> None:
                to = code.at(self.scratch, code.mul(i, job.block[1]), job.element)
                self._pack_pixel(to, code.at(source, code.mul(i, job.channels[0]), job.element))

            code.loop("pixel", 0, count, 1, pixel)

        def tiles(call: _Call) -> None:
            def one(i: str) -> None:
                i = code.least(i, code.op("sub", count, width))
                call(code.mul(i, job.pitches[1]), code.mul(code.add(start, i), job.channels[1]), "0", "1")

            code.loop("tile", 0, count, width, one)

        return pack, self.scratch if job.pack else source, tiles

    def _image(self, panel: str) -> tuple[Callable[[], None], str, Callable[[_Call], None]]:
        """The same for a panel of some output rows of an image."""
        code, job = self.code, self.job
        (H, W), (P, Q), (height, width) = job.size, job.out, job.tile
        (R, _), (top_pad, left_pad), (dilation, _) = job.kernel, job.padding, job.dilation
        image, inner = code.op("sdiv", panel, "%panels"), code.op("srem", panel, "%panels")
        top, bottom = self._share(inner, -(-P // height), height)
        bottom, top = code.least(bottom, P), code.least(top, P - height)
        rows = code.op("sub", bottom, top)
        y = code.mul(code.add(code.mul(image, P), top), Q)

        def pack() -> None:
            source = code.at("%x", code.mul(image, H * W * job.channels[0]), job.element)
            above = code.op("sub", code.mul(top, job.stride[0]), top_pad)
            down, right = (s // step for s, step in zip(job.stride, job.step, strict=True))
            lines = code.add(code.mul(code.op("sub", rows, 1), job.step[0]), dilation * (R - 1) + 1)

            def line(a: str) -> None:
                at_row = code.add(above, code.mul(a, down))
                row_inside = code.value(f"icmp ult i64 {at_row}, {H}")

                def pixel(b: str) -> None:
                    at_column = code.op("sub", code.mul(b, right), left_pad)
                    inside = code.value(f"icmp ult i64 {at_column}, {W}")
                    inside = code.value(f"and i1 {row_inside}, {inside}")
                    to = code.at(
                        self.scratch,
                        code.mul(code.add(code.mul(a, job.panel[1]), b), job.block[1]),
                        job.element,
                    )

                    def copy() -> None:
                        at = code.mul(code.add(code.mul(at_row, W), at_column), job.channels[0])
                        self._pack_pixel(to, code.at(source, at, job.element))

                    code.when(inside, copy, lambda: self._pack_pixel(to, None))

                code.loop("pixel", 0, job.panel[1], 1, pixel)

            code.loop("line", 0, lines, 1, line)

        def tiles(call: _Call) -> None:
            def tile_row(a: str) -> None:
                a = code.least(a, code.op("sub", rows, height))
                first, last = "0", str(R)
                if R > 1 and top_pad > 0:  # kernel rows that meet the image in some row of the tile
                    above = code.op("sub", top_pad, code.mul(code.add(top, a), job.stride[0]))
                    least = code.op("sub", above, (height - 1) * job.stride[0])
                    first = code.op("sdiv", code.most(code.add(least, dilation - 1), 0), dilation)
                    last = code.op("sdiv", code.most(code.add(above, H - 1 + dilation), 0), dilation)
                    last = code.least(last, R)

                def one(b: str) -> None:
                    b = code.least(b, Q - width)
                    at_x = code.add(code.mul(a, job.pitches[0]), code.mul(b, job.pitches[1]))
                    at_y = code.add(code.add(y, code.mul(a, Q)), b)
                    call(at_x, code.mul(at_y, job.channels[1]), first, last)

                code.loop("tile", 0, Q, width, one)

            code.loop("tile_row", 0, rows, height, tile_row)

        if job.pack:
            return pack, self.scratch, tiles
        above = code.add(code.mul(image, H * W * job.channels[0]), code.mul(top, job.pitches[0]))
        return pack, code.at("%x", above, job.element), tiles

    def _row(self, row: str, x: str, tiles: Callable[[Callable[..., None]], None]) -> None:
        """All tiles of a panel for one row of blocks."""
        code, job = self.code, self.job
        stop = code.least(code.index("%crow", code.add(row, 1)), "%nnz")  # wrong indices must not read beyond
        start = code.least(code.index("%crow", row), stop)
        n = code.op("sub", stop, start)
        group, inner = code.op("sdiv", row, job.grid[0]), "0"
        if job.grid[0] > 1:
            inner = code.op("srem", row, job.grid[0])
        channel = code.add(code.mul(group, self.group_out), code.mul(inner, job.block[0]))
        if job.pack:
            x = code.at(x, code.mul(code.mul(group, job.grid[1]), self.plane), job.element)
        else:
            x = code.at(x, code.mul(group, self.group_in), job.element)
        numel = job.kernel[0] * job.kernel[1] * job.block[0] * job.block[1]
        w = code.at("%w", code.mul(start, numel), job.element)
        col = code.at("%col", start, "i32")

        def call(height: int, at_x: str, at_y: str, first: str, last: str) -> None:
            at_x = code.at(x, at_x, job.element)
            for part, width in widths(job, height):
                output = code.add(channel, part)
                pointers = (
                    at_x,
                    code.at("%y", code.add(at_y, output), job.element),
                    code.at("%bias", output, job.element),
                    code.at("%residual", code.add(at_y, output), job.element),
                    col,
                    code.at(w, part, job.element),
                )
                numbers = (self.plane, n, first, last)
                given = [*(f"ptr {p}" for p in pointers), *(f"i64 {i}" for i in numbers)]
                code.emit(f"call void @tile_{width}({', '.join(given)})")

        if job.grid[0] > 1 and job.edge != job.block[0]:
            whole = code.value(f"icmp slt i64 {inner}, {job.grid[0] - 1}")
            code.when(whole, lambda: tiles(partial(call, job.block[0])), lambda: tiles(partial(call, job.edge)))
        else:
            tiles(partial(call, job.edge))

    def _pack_pixel(self, to: str, source: str | None) -> None:
        """Copy the channels of a pixel to its place in the plane of each column of blocks, or write zeros."""
        code, job, BC = self.code, self.job, self.job.block[1]
        full, rest = divmod(self.group_in, BC)

        def column(from_: str | None, to: str, count: int) -> None:
            self._copy(to, from_, count)
            self._copy(code.at(to, count, job.element), None, BC - count)

        def group(g: str) -> None:
            first = code.at(to, code.mul(code.mul(g, job.grid[1]), self.plane), job.element)
            from_ = code.at(source, code.mul(g, self.group_in), job.element) if source else None

            def one(c: str, count: int) -> None:
                at = code.at(from_, code.mul(c, BC), job.element) if from_ else None
                column(at, code.at(first, code.mul(c, self.plane), job.element), count)

            if full:
                code.loop("column", 0, full, 1, lambda c: one(c, BC))
            if rest:
                one(str(full), rest)

        if job.groups == 1:
            group("0")
        else:
            code.loop("group", 0, job.groups, 1, group)

    def _copy(self, to: str, source: str | None, count: int) -> None:
        """`count` elements from `source`, or zeros, in pieces that a register holds."""
        code, job, start = self.code, self.job, 0
        most = job.target.lanes * 4 // job.bytes
        while start < count:
            n = min(most, 1 << ((count - start).bit_length() - 1))
            kind, value = f"<{n} x {job.element}>", "zeroinitializer"
            if source:
                value = code.load(code.at(source, start, job.element), kind, job.bytes)
            code.emit(f"store {kind} {value}, ptr {code.at(to, start, job.element)}, align {job.bytes}")
            start += n
