"""The CPU engine's micro-kernel for bfloat16 on tile registers (AMX): as `cpu_tile`, with the sums in tiles.

A tile register holds up to 16 rows of 64 bytes. One multiplication takes up to 16 pixels times up to 32 inputs, and
those inputs, in pairs, times 16 outputs, and adds to the float32 sums of those pixels and outputs:

    registers 0 to 3: sums of `pieces x columns`: up to 16 pixels of a row by 16 outputs
    registers 4 and 5: a piece's inputs, loaded with the distance of neighbouring pixels as their stride
    registers 6 and 7: weights of 16 outputs

The sums pass through memory to the epilogue of `cpu_tile`. Taps that fall on padding read the border's zeros.
"""

from __future__ import annotations

from fxdbsr.kernels.cpu_conv import Conv
from fxdbsr.kernels.cpu_tile import Tile


def tile(conv: Conv, start: int, count: int) -> str:
    """The function `@tile_{rows}_{start}_{count}`, as that of `cpu_tile.tile`."""
    return _RegisterTile(conv, start, count).write()


class _RegisterTile(Tile):
    def __init__(self, conv: Conv, start: int, count: int) -> None:
        super().__init__(conv, start, count)
        self.types = []  # loops carry no sums
        rows, columns = conv.tile
        self.pixels_of_piece = columns // -(-columns // 16)
        self.pieces = [(a, b) for a in range(rows) for b in range(0, columns, self.pixels_of_piece)]
        run = min(taps for _, taps, _ in self._runs()) * conv.inputs
        self.chunk = next(n for n in range(32, 0, -2) if run % n == 0)  # inputs of one multiplication

    def write(self) -> str:
        """The function's text, after the configuration of its registers."""
        code, columns = self.code, len(self.vectors)
        assert len(self.pieces) * columns <= 4
        code.emit("%sums = alloca [4096 x i8], align 64")
        code.call("void", "llvm.x86.ldtilecfg", ("ptr", f"@config_{self.start}_{self.count}"))  # sets the sums to zero
        self._loop("block", 0, "%n", 1, self._block, [])
        for register in range(len(self.pieces) * columns):
            at = code.at("%sums", 1024 * register, "i8")
            code.call("void", "llvm.x86.tilestored64", ("i8", register), ("ptr", at), ("i64", 64))
        for i, (a, b) in enumerate(self.pieces):
            for p in range(self.pixels_of_piece):
                for n, vector in enumerate(self.vectors):
                    at = code.at("%sums", 1024 * (i * columns + n) + 64 * p, "i8")
                    self._store(code.load(at, "<16 x float>", 64), a, b + p, *vector)
        return f"{self._config()}\n{self._function()}"

    def _config(self) -> str:
        """Rows and bytes a row of each register."""
        pixels, inputs, weights = (
            (self.pixels_of_piece, 64),
            (self.pixels_of_piece, 2 * self.chunk),
            (self.chunk // 2, 64),
        )
        shapes = dict.fromkeys(range(4), pixels) | dict.fromkeys((4, 5), inputs) | dict.fromkeys((6, 7), weights)
        config = bytearray(64)
        config[0] = 1
        for register, (rows, size) in shapes.items():
            config[16 + 2 * register], config[48 + register] = size, rows
        text = "".join(f"\\{byte:02X}" for byte in config)
        return f'@config_{self.start}_{self.count} = internal constant [64 x i8] c"{text}", align 64'

    def _run(self, x: str, w: str, taps: int, pixels: tuple[int, ...], sums: list[str]) -> list[str]:
        """The run of k at x and w for all pixels."""
        code, conv = self.code, self.conv
        pitch, row = 2 * conv.stride[1] * conv.x.pixel, 4 * conv.order.height

        def chunk(k: str) -> None:
            at_x, at_w = code.at(x, k), code.at(w, code.mul(k, conv.order.height))
            for n, (start, _, _) in enumerate(self.vectors):
                self._load(6 + n, code.at(at_w, 2 * start), row)
            for i, (a, b) in enumerate(self.pieces):
                offset = a * conv.stride[0] * conv.x.line + b * conv.stride[1] * conv.x.pixel
                self._load(4 + i % 2, code.at(at_x, offset), pitch)
                for n in range(len(self.vectors)):
                    sum_ = i * len(self.vectors) + n
                    code.call("void", "llvm.x86.tdpbf16ps", ("i8", sum_), ("i8", 4 + i % 2), ("i8", 6 + n))

        code.loop("k", 0, taps * conv.inputs, self.chunk, chunk)
        return sums

    def _load(self, register: int, pointer: str, stride: int) -> None:
        self.code.call("void", "llvm.x86.tileloadd64", ("i8", register), ("ptr", pointer), ("i64", stride))
