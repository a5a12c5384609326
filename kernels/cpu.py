"""The CPU engine: block-sparse conv by code compiled for this machine, on the threads of torch.

    y = activation(conv(x, unpack(values)) + bias + residual)

This file is the engine as the operator sees it: one conv between tensors with channels last. `cpu_call` checks and
plans a call; `cpu_tile` and `cpu_steps` write the code, `jit` compiles it, `cpu_layout`, `cpu_plan` and `cpu_cuts` say
where everything lies and who does what. `fxdbsr.network` puts the steps of a whole model together.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels import jit
from fxdbsr.kernels.cpu_call import error_of, fits, planned
from fxdbsr.kernels.cpu_call import why_not as why_not
from fxdbsr.kernels.cpu_layout import Order


def layout(values: Tensor) -> Tensor:
    """`values [nnz, BO, BC, R, S]` with the same entries, in memory as `[nnz, R, S, BC, BO]`."""
    return values.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)


def tables(
    grid: BlockGrid,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[Tensor]:
    """The weights in the order in which the code reads them, where `layout` does not give it. Checks the indices.

    Raises:
        ValueError: an index that is not one of `grid`.
    """
    rows, columns = grid.shape
    if crow_indices.shape != (rows + 1,) or crow_indices[0] != 0 or bool((crow_indices.diff() < 0).any()):
        raise ValueError(f"crow_indices: expected {rows + 1} offsets that start at 0 and do not fall")
    if col_indices.shape != (int(crow_indices[-1]),) or len(col_indices) != len(values):
        raise ValueError(f"col_indices: expected one for each of the {len(values)} blocks, as in crow_indices")
    if bool(((col_indices < 0) | (col_indices >= columns)).any()):
        raise ValueError(f"col_indices: expected columns 0 to {columns - 1}")
    target = jit.host()
    return [] if target is None else ordered(grid, values, target)


def ordered(grid: BlockGrid, values: Tensor, target: jit.Target) -> list[Tensor]:
    """The weights in the order that code for `target` reads; nothing where `values` have it by their strides."""
    bfloat16 = values.dtype == torch.bfloat16
    order = Order.of(grid, target, bfloat16)
    return [] if order.is_stored(grid, bfloat16) else [order.weights(values)]


def conv(
    input: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    tables: Sequence[Tensor],
    in_channels: int,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    negative_slope: float,
    target: jit.Target | None = None,
) -> Tensor:
    """`[N, C, H, W]` to `[N, O, P, Q]`, channels last; arguments as in the operator `torch.ops.fxdbsr.conv`.

    Args:
        target: what the code is compiled for, this machine by default; `tables` must be in its order.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    plan = planned(
        input.shape,
        values.shape,
        values.stride(),
        values.dtype,
        tuple(t.shape for t in tables),
        in_channels,
        out_channels,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        bias is not None,
        residual is not None,
        activation,
        negative_slope,
        torch.get_num_threads(),
        target,
    )
    if not input.is_contiguous(memory_format=torch.channels_last):
        input = input.contiguous(memory_format=torch.channels_last)
    if residual is not None and not residual.is_contiguous(memory_format=torch.channels_last):
        residual = residual.contiguous(memory_format=torch.channels_last)
    dtype = plan.dtype
    if not (
        input.dtype is dtype
        and input.is_cpu
        and values.is_cpu
        and crow_indices.is_cpu
        and col_indices.is_cpu
        and crow_indices.dtype is torch.int32
        and col_indices.dtype is torch.int32
        and crow_indices.shape == plan.crow_shape
        and col_indices.shape == plan.col_shape
        and crow_indices.is_contiguous()
        and col_indices.is_contiguous()
        and (bias is None or (fits(bias, dtype, plan.bias_shape) and bias.is_contiguous()))
        and (residual is None or fits(residual, dtype, plan.shape))
    ):
        raise error_of(plan, input, values, crow_indices, col_indices, bias, residual)
    output = torch.empty_strided(plan.shape, plan.stride, dtype=dtype)
    if plan.program is not None:
        weights = tables[0] if tables else values
        given = (input, output, residual, bias, weights, crow_indices, col_indices)
        addresses = [0 if t is None else t.data_ptr() for t in given]
        addresses.append(_scratch(plan.scratch_bytes) if plan.scratch_bytes else 0)
        plan.program.call(addresses).run()
    return output


def _scratch(size: int) -> int:
    """Address of `size` bytes that belong to the calling thread."""
    if getattr(_own, "size", 0) < size:
        _own.scratch = torch.empty(size, dtype=torch.uint8)
        _own.size = size
        _own.address = _own.scratch.data_ptr()
    address: int = _own.address
    return address


_own = threading.local()
