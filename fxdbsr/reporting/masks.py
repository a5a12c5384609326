"""A layer's block mask as a PNG of one pixel a block."""

from __future__ import annotations

import base64
import struct
import zlib

from torch import Tensor

KEPT, ZERO = (37, 99, 175), (214, 217, 222)


def data_url(mask: Tensor) -> str:
    """`png(mask)` for the `src` of an image."""
    return f"data:image/png;base64,{base64.b64encode(png(mask)).decode()}"


def png(mask: Tensor) -> bytes:
    """`mask [rows, columns]`, at least 1x1, as a PNG of one bit a pixel and two colours.

    Source of the format: W3C, Portable Network Graphics Specification.
    """
    rows, columns = mask.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = []
    for line in mask.tolist():
        bits = "".join("1" if kept else "0" for kept in line).ljust(-(-columns // 8) * 8, "0")
        lines.append(b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big"))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 1, 3, 0, 0, 0))
        + chunk(b"PLTE", bytes((*ZERO, *KEPT)))
        + chunk(b"IDAT", zlib.compress(b"".join(lines), 9))
        + chunk(b"IEND", b"")
    )
