# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Two kernels that load one unit of a GPU alone; a module of their own, since they are compiled or interpreted."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_all(x_ptr, y_ptr, steps, BLOCK: tl.constexpr, CACHE: tl.constexpr):
    """Every program reads the whole buffer of `steps * BLOCK` ints, each from its own start."""
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.int32)
    for step in range(steps):
        acc += tl.load(x_ptr + (step + program * 5) % steps * BLOCK + i, cache_modifier=CACHE)
    tl.store(y_ptr + program, tl.sum(acc, 0))


@triton.jit
def multiply_all(a_ptr, b_ptr, y_ptr, steps, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """`steps` products of the same two operands, which stay in shared memory."""
    m, n, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    a = tl.load(a_ptr + m[:, None] * DEPTH + k[None, :])
    b = tl.load(b_ptr + n[:, None] * DEPTH + k[None, :])
    acc = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for _ in range(steps):
        acc = tl.dot(a, tl.trans(b), acc)
    tl.store(y_ptr + tl.program_id(0) * (ROWS * COLUMNS) + m[:, None] * COLUMNS + n[None, :], acc)
