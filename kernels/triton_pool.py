# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Max pooling of images whose channels lie last, each input read once: what stands between the convs of a network.

    y[m, c] = max over taps (r, s) of x[pixel(m) + offset(r, s), c]

NaN is passed on, as torch does.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxdbsr.kernels.geometry import empty_output, output_size
from fxdbsr.kernels.triton_call import Call

ELEMENTS = 1024  # of the output, a program
WARPS = 4


@triton.jit
def pool_kernel(
    x_ptr,
    y_ptr,
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
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """BM output pixels by BC channels."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    image = m // (P * Q)
    h = m // Q % P * SH - PH
    w = m % Q * SW - PW
    x_ptrs = x_ptr + (((image * H + h) * W + w) * C)[:, None] + c[None, :]
    live = (m < pixels)[:, None] & (c < C)[None, :]
    best = tl.full((BM, BC), float("-inf"), x_ptr.dtype.element_ty)
    for r in tl.static_range(R):
        for s in tl.static_range(S):
            inside = (h + r * DH >= 0) & (h + r * DH < H) & (w + s * DW >= 0) & (w + s * DW < W)
            x = tl.load(x_ptrs + (r * DH * W + s * DW) * C, mask=live & inside[:, None], other=float("-inf"))
            best = tl.maximum(best, x, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + m[:, None] * C + c[None, :], best, mask=live)


def why_not(
    input: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> str | None:
    """A sentence that says why this kernel does not pool `input`; None where it does."""
    if input.dim() != 4 or input.numel() == 0:
        return "it pools batches of images"
    if input.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it pools float16, bfloat16 and float32, not {str(input.dtype).removeprefix('torch.')}"
    if input.shape[1] % 8 or not input.is_contiguous(memory_format=torch.channels_last):
        return "it reads channels that lie last, a multiple of 8 of them"
    size = output_size(input.shape[2:], kernel, stride, padding, dilation)
    if min(size) < 1 or any(2 * p > d * (k - 1) + 1 for p, d, k in zip(padding, dilation, kernel, strict=True)):
        return "torch says what is wrong with it"
    if max(kernel) > 7 or max(input.numel(), prod(input.shape[:2]) * prod(size)) >= 2**31:
        return "it takes up to 7 taps an axis, and fewer than 2**31 numbers"
    return None


def max_pool(
    input: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """`[N, C, H, W]` to `[N, C, P, Q]`, channels last; of what `why_not` lets pass."""
    channels = input.shape[1]
    output = empty_output(input, channels, output_size(input.shape[2:], kernel, stride, padding, dilation))
    call = Call(input, None, None, output, kernel, stride, padding, dilation, "none", 0.0)
    geometry = {n: v for n, v in call.constants().items() if n not in ("O", "HAS_BIAS", "HAS_RESIDUAL", "ACTIVATION")}
    wide = min(128, triton.next_power_of_2(channels))
    tall = ELEMENTS // wide
    with torch.cuda.device_of(input):
        pool_kernel[(triton.cdiv(call.pixels, tall), triton.cdiv(channels, wide))](
            input, output, call.pixels, **geometry, BM=tall, BC=wide, num_warps=WARPS
        )
    return output
