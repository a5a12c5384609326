# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""How the gather kernel multiplies: which operand comes first, and float32 from two tf32 numbers.

3xTF32 forms high*high + high*low + low*high of operands split into two tf32 numbers each, which keeps about
22 bits of the 24 of float32; where float32 would give an infinity it gives NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_tf32(x):
    """`x` rounded to the 10 bits of tf32, and what is left."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -8192
    high = bits.to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def multiply(x, w, acc, WEIGHTS_FIRST: tl.constexpr, LANES_LAST: tl.constexpr, PRECISION: tl.constexpr):
    """`acc + x w^T`, or its transpose `acc + w x^T`; x is [BM, BK], w is [BN, BK], or [BK, BN] with LANES_LAST."""
    if LANES_LAST:
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    elif WEIGHTS_FIRST:
        acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    return acc
