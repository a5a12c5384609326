# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Which pixels a program computes, and where a pixel reads: its offset in the input, which taps lie inside the image.

x is `[N, H, W, C]`, channels last. An entry of the tables, `channel | r << 24 | s << 27`, moves the offset to a
channel and a tap (r, s); r = s = 7 stands for padding of a step, which reads as zero.

Where a max pool of POOL by POOL follows, pixels are counted window by window, so that a tile holds whole ones: pixel m
is m % POOL**2 of window m // POOL**2, and windows are counted by image, row and column. What no window covers, at the
right and the bottom, is no pixel at all.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(pixels, parts, BM: tl.constexpr, GROUP: tl.constexpr):
    """(part of the outputs, tile of BM pixels) of this program.

    All tiles of a part, then those of the next: unions come with the longest first, so that the short ones fill up
    what is left (`triton_schedule`). Tiles are taken in even groups of up to GROUP, whose input stays in L2 meanwhile.
    """
    tiles = (pixels + BM - 1) // BM
    groups = (tiles + GROUP - 1) // GROUP
    size = (tiles + groups - 1) // groups
    first = tl.program_id(0) // (parts * size) * size
    inside = tl.program_id(0) - first * parts
    here = tl.minimum(size, tiles - first)
    return inside // here, first + inside % here


@triton.jit
def position(m, P: tl.constexpr, Q: tl.constexpr, POOL: tl.constexpr):
    """(image, row, column) of output pixel `m` of images of P by Q pixels, both multiples of POOL."""
    if POOL == 1:
        image = m // (P * Q)
        p = m // Q - image * P
        q = m - (m // Q) * Q
    else:
        window = m // (POOL * POOL)
        inside = m - window * (POOL * POOL)
        row = window // (Q // POOL)
        image = row // (P // POOL)
        p = (row - image * (P // POOL)) * POOL + inside // POOL
        q = (window - row * (Q // POOL)) * POOL + inside % POOL
    return image, p, q


@triton.jit
def larger(a, b):
    """The larger one of two numbers; NaN where one of them is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def pool_last(acc, OUTPUTS: tl.constexpr, PIXELS: tl.constexpr, POOL: tl.constexpr):
    """The largest of each window's pixels: `acc [OUTPUTS, PIXELS]` to `[OUTPUTS, PIXELS / POOL**2]`."""
    windows = tl.reshape(acc, (OUTPUTS, PIXELS // (POOL * POOL), POOL * POOL))
    return tl.reduce(windows, 2, larger)


@triton.jit
def tap_bits(
    h, w, H: tl.constexpr, W: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr
):
    """Bit r for row h + r*DH and bit 8 + s for column w + s*DW that lie inside the image."""
    bits = h * 0
    for r in tl.static_range(R):
        bits = bits | (((h + r * DH >= 0) & (h + r * DH < H)).to(tl.int32) << r)
    for s in tl.static_range(S):
        bits = bits | (((w + s * DW >= 0) & (w + s * DW < W)).to(tl.int32) << (8 + s))
    return bits


@triton.jit
def pixel_offsets(
    m,
    pixels,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    POOL: tl.constexpr,
):
    """Element offset of tap (0, 0) of output pixel `m`, and bits that tell which taps lie inside the image.

    Bit r*S + s for kernels of up to 31 taps; for larger ones bit r for rows and bit 8 + s for columns.
    """
    m = tl.minimum(m, pixels - 1)  # past the end: read the last pixel again, store nothing
    image, p, q = position(m, P, Q, POOL)
    h = p * SH - PH
    w = q * SW - PW
    base = ((image * H + h) * W + w) * C
    bits = m * 0
    if PH > 0 or PW > 0:
        if R * S <= 31:
            for r in tl.static_range(R):
                for s in tl.static_range(S):
                    row = (h + r * DH >= 0) & (h + r * DH < H)
                    inside = row & (w + s * DW >= 0) & (w + s * DW < W)
                    bits = bits | (inside.to(tl.int32) << (r * S + s))
        else:
            bits = tap_bits(h, w, H, W, R, S, DH, DW)
    return base, bits


@triton.jit
def decode(entry):
    """channel, r, s of an entry."""
    return entry & 0xFFFFFF, (entry >> 24) & 7, entry >> 27


@triton.jit
def tap_inside(bits, r, s, R: tl.constexpr, S: tl.constexpr):
    """True where tap (r, s) lies inside the image, by the `bits` of `pixel_offsets`; False for padding of a step."""
    inside = (bits >> r) & (bits >> (8 + s)) if R * S > 31 else bits >> tl.minimum(r * S + s, 31)
    return (inside & 1) != 0
