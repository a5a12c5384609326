"""What a call of the CPU engine needs, found once for its sizes: the checks, the program, the shapes it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels import jit
from fxdbsr.kernels.cpu_images import Copy
from fxdbsr.kernels.cpu_layout import Layout
from fxdbsr.kernels.cpu_plan import Geometry, conflicts, packed_input, takes
from fxdbsr.kernels.cpu_program import Place, Program, conv_of, copy_of


def why_not(
    grid: BlockGrid,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
    target: jit.Target | None = None,
) -> str | None:
    """Why this engine cannot run a conv on `target` (default: this machine); None if it can."""
    if find_spec("llvmlite") is None:
        return "llvmlite is not installed (the extra `cpu`)"
    target = target or jit.host()
    if target is None:
        return "the CPU has neither AVX2 with FMA nor NEON"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the CPU engine takes float32 and bfloat16, not {dtype}"
    if dtype == torch.bfloat16 and not target.bfloat16:
        return "the CPU has no bfloat16 dot products (avx512_bf16)"
    if len(grid.kernel_size) != 2 or grid.transposed:
        return "the CPU engine takes 2-d convs that are not transposed"
    if max(grid.kernel_size) > 7:
        return f"the kernel {grid.kernel_size} is larger than 7"
    bo, bc = grid.block_size
    if max(bo, bc) > 128:
        return f"blocks of {bo}x{bc} are larger than 128 a side"
    inputs = grid.in_channels // grid.groups
    if grid.groups > 1 and bo > grid.out_channels // grid.groups and (inputs > 32 or bc < inputs):
        return f"blocks hold several groups, and not all of at most 32 inputs of each (but {bc} of {inputs})"
    return None


@dataclass(frozen=True)
class CallPlan:
    """How a call goes.

    Attributes:
        program: the steps; None for an empty batch.
        shape, stride: of the output.
        crow_shape, col_shape, bias_shape: of the arguments.
        dtype: of all tensors but the indices.
        scratch_bytes: of the calling thread that the program writes to.
    """

    program: Program | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    crow_shape: tuple[int]
    col_shape: tuple[int]
    bias_shape: tuple[int]
    dtype: torch.dtype
    scratch_bytes: int


@lru_cache(maxsize=4096)
def planned(
    input_shape: tuple[int, ...],
    values_shape: tuple[int, ...],
    values_stride: tuple[int, ...],
    dtype: torch.dtype,
    tables_shape: tuple[tuple[int, ...], ...],
    in_channels: int,
    out_channels: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    bias: bool,
    residual: bool,
    activation: str,
    negative_slope: float,
    threads: int,
    target: jit.Target | None,
) -> CallPlan:
    """Check the sizes and put the steps together."""
    if len(values_shape) != 5:
        raise ValueError(f"values: expected [nnz, BO, BC, R, S], got {tuple(values_shape)}")
    nnz, bo, bc, r, s = values_shape
    grid = BlockGrid(out_channels, in_channels, (r, s), groups, (bo, bc))
    target = target or jit.host()
    reason = why_not(grid, stride, padding, dilation, dtype, target)
    if reason is not None or target is None:
        raise ValueError(f"values: {reason}")
    if len(input_shape) != 4 or input_shape[1] != in_channels:
        raise ValueError(f"input: expected [N, {in_channels}, H, W], got {tuple(input_shape)}")
    bfloat16 = dtype == torch.bfloat16
    conv = Geometry(grid, stride, padding, dilation, bfloat16, bias, activation, negative_slope)
    order = conv.order(target)
    if not order.is_stored(grid, bfloat16):
        expected: tuple[int, ...] = (nnz, r, s, -(-bc // order.unit), order.height, order.unit)
        if tables_shape != (expected,):
            raise ValueError(f"tables: expected weights of shape {expected}, as `tables` gives, got {tables_shape}")
    else:
        expected = (bo * bc * r * s, 1, bo, s * bc * bo, bc * bo)
        if nnz and any(a != b for a, b, n in zip(values_stride, expected, values_shape, strict=True) if n > 1):
            raise ValueError(f"values: expected the strides {expected} that `layout` gives, got {values_stride}")
    n, _, h, w = input_shape
    p, q = conv.out((h, w))
    if p < 1 or q < 1:
        raise ValueError(f"input: too small for the kernel, {tuple(input_shape)} gives output size {(p, q)}")
    if max(n * in_channels * (h + 2 * padding[0]) * (w + 2 * padding[1]), n * out_channels * p * q) >= 1 << 31:
        raise ValueError(f"input: {tuple(input_shape)} makes tensors of more than 2^31 elements")
    program, scratch = _program(conv, target, n, (h, w), residual, nnz, threads) if n else (None, 0)
    return CallPlan(
        program,
        (n, out_channels, p, q),
        (p * q * out_channels, 1, q * out_channels, out_channels),
        (grid.shape[0] + 1,),
        (nnz,),
        (out_channels,),
        dtype,
        scratch,
    )


def _program(
    conv: Geometry, target: jit.Target, images: int, size: tuple[int, int], residual: bool, nnz: int, threads: int
) -> tuple[Program, int]:
    """A copy of the input to scratch where the conv cannot read it well, then the conv; bytes of scratch.

    Buffers: input, output, residual, bias, weights, crow_indices, col_indices, scratch.
    """
    x = Layout.channels_last(conv.grid.in_channels, size)
    y = Layout.channels_last(conv.grid.out_channels, conv.out(size))
    item, steps, scratch, source = 2 if conv.bfloat16 else 4, [], 0, 0
    if not takes(conv, target, x) or conflicts(conv.stride[1] * x.pixel * item, min(y.size[1], 14)):
        packed = packed_input(conv, target, size)
        steps.append(copy_of(Copy(target, conv.bfloat16, x, packed), images, (Place(0), Place(7))))
        x, source, scratch = packed, 7, images * packed.image * item + 64
    places = [Place(source), *(Place(i) for i in range(1, 7))]
    steps.append(conv_of(conv, target, images, threads, (x, y, y if residual else None), places, nnz))
    return Program(target, steps, threads), scratch


def error_of(plan: CallPlan, *tensors: Tensor | None) -> Exception:
    """The error that names the first tensor that does not fit the plan."""
    names = ("input", "values", "crow_indices", "col_indices", "bias", "residual")
    shapes = (None, None, plan.crow_shape, plan.col_shape, plan.bias_shape, plan.shape)
    for name, tensor, shape in zip(names, tensors, shapes, strict=True):
        if tensor is None:
            continue
        dtype = torch.int32 if name.endswith("indices") else plan.dtype
        if tensor.dtype != dtype:
            return TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
        if not tensor.is_cpu:
            return ValueError(f"{name}: expected on the CPU, got {tensor.device}")
        if shape is not None and tensor.shape != shape:
            return ValueError(f"{name}: expected {tuple(shape)}, got {tuple(tensor.shape)}")
        if shape is not None and len(shape) == 1 and not tensor.is_contiguous():
            return ValueError(f"{name}: expected contiguous, got stride {tensor.stride()}")
    return AssertionError("all tensors fit")


def fits(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is on the CPU and of that dtype and shape."""
    return tensor.dtype is dtype and tensor.is_cpu and tensor.shape == shape
