"""The Triton engine: block-sparse conv on a GPU.

    y = activation(conv(x, unpack(values)) + bias + residual)

This file is the engine's face: what it can run, what it prepares, what it calls. `triton_pack` makes the
tables, `triton_plan` chooses tiles, `triton_gather` holds the kernel. The tables carry a copy of the weights
in the order in which the kernel reads them: after a change of `values`, make them anew. With
TRITON_INTERPRET=1 in the environment before this module is imported, it runs, slowly, on CPU tensors.

float32 follows cuDNN's switch for convs (`torch.backends.cudnn.conv.fp32_precision`, formerly `allow_tf32`):
tf32 where it is on, which is PyTorch's default, ieee otherwise. Sums are float32 always.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.geometry import empty_output, output_size
from fxdbsr.kernels.triton_call import Call
from fxdbsr.kernels.triton_pack import entry_width, pack, run_length
from fxdbsr.kernels.triton_pack_bitmask import pack_bitmask, why_not_bitmask
from fxdbsr.kernels.triton_plan import (
    BITMASK_CONFIGS,
    DTYPES,
    adapt,
    choose_tile,
    packed_weights,
    precision_of,
)
from fxdbsr.kernels.triton_roofline import why_dense

__all__ = ["conv", "layout", "packed_weights", "tables", "why_dense", "why_not", "why_not_bitmask"]

LIMIT = 2**31
INPUT_PRECISION = {"16": "ieee", "tf32": "tf32", "ieee": "ieee", "3xtf32": "3xtf32"}


def why_not(
    grid: BlockGrid,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """A sentence that says why this engine cannot run the conv; None where it can."""
    bo, bc = grid.block_size
    channels = grid.in_channels // grid.groups
    if len(grid.kernel_size) != 2:
        return f"the Triton engine runs 2-d convs, this one has {len(grid.kernel_size)} spatial axes"
    if grid.transposed:
        return "the Triton engine does not run transposed convs"
    if dtype not in DTYPES:
        return f"the Triton engine runs float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if max(grid.kernel_size) > 7:
        return f"the Triton engine runs kernels of up to 7 taps an axis, this one has {grid.kernel_size}"
    if channels < 32:
        return f"the Triton engine needs 32 input channels in a group, this conv has {channels}"
    if not (8 <= bo <= 128 or (bo > 128 and grid.out_channels // grid.groups <= 128)) or not 8 <= bc <= 128:
        return f"the Triton engine runs blocks of 8 to 128 a side, this conv has {bo}x{bc}"
    if not _installed():
        return "Triton is not installed"
    if device.type == "cpu" and not _interpreted():
        return "the Triton engine needs a CUDA device, the conv is on cpu"
    if device.type not in ("cpu", "cuda"):
        return f"the Triton engine needs a CUDA device, the conv is on {device.type}"
    if device.type == "cuda" and torch.cuda.is_available() and not torch.version.hip:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"the Triton engine needs compute capability 8.0, this device has {capability}"
    return None


def layout(values: Tensor) -> Tensor:
    """`values [nnz, BO, BC, R, S]`, contiguous: the kernel reads the copy in the tables."""
    return values.contiguous()


def tables(
    grid: BlockGrid,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    rows_per_union: int | None = None,
    kernel: str = "gather",
    precision: str | None = None,
) -> list[Tensor]:
    """`[entries, pointers, weights, outputs]` as `triton_gather` describes them; they serve any input size.

    Args:
        rows_per_union: rows of blocks that share an activation tile, 1, 2 or 4; None lets the planner choose.
        kernel: "gather", or "bitmask" where `why_not_bitmask` allows it; then `triton_bitmask` describes the
            tables, five of them.
        precision: "3xtf32" for float32 accuracy on tensor cores (gather kernel); None as the module says.

    Raises:
        ValueError: the kernel cannot run the conv; an unknown kernel or precision.
    """
    if precision is not None:
        reason = _why_not_precise(precision, values.dtype, kernel)
        if reason is not None:
            raise ValueError(f"precision: {reason}")
    if kernel == "bitmask":
        reason = why_not_bitmask(grid, values.dtype)
        if reason is not None:
            raise ValueError(f"kernel: {reason}")
        return pack_bitmask(grid, values, crow_indices, col_indices)
    if kernel != "gather":
        raise ValueError(f"kernel: expected gather or bitmask, got {kernel!r}")
    return pack(grid, values, crow_indices, col_indices, rows_per_union, precision)


def _why_not_precise(precision: str, dtype: torch.dtype, kernel: str) -> str | None:
    if precision != "3xtf32":
        return f"expected 3xtf32 or None, got {precision!r}"
    if dtype != torch.float32:
        return f"3xtf32 is for float32, the weights are {dtype}"
    if kernel != "gather":
        return f"3xtf32 is for the gather kernel, not {kernel}"
    import triton

    if torch.version.hip:
        return "3xtf32 runs on NVIDIA GPUs"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        return f"3xtf32 needs Triton 3.7, which orders copies before wgmma; this is {triton.__version__}"
    return None


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
) -> Tensor:
    """`[N, I, H, W]` to `[N, O, P, Q]`, channels last; arguments as in the operator `torch.ops.fxdbsr.conv`.

    Raises:
        ValueError: tables that are not this engine's, or made for another dtype or device; an image of 2**31
            elements and more.
    """
    _check_tables(input, tables)
    run = _run_gather if len(tables) == 4 else _run_bitmask
    kernel_size = values.shape[3:]
    spatial = output_size(input.shape[2:], kernel_size, stride, padding, dilation)
    output = empty_output(input, out_channels, spatial)
    images = _images_per_launch(input, output)
    input = input.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    # Triton launches on the current device
    with torch.cuda.device_of(input):
        for start in range(0, input.shape[0], images):
            part = slice(start, start + images)
            call = Call(
                input[part],
                bias,
                None if residual is None else residual[part],
                output[part],
                kernel_size,
                stride,
                padding,
                dilation,
                activation,
                negative_slope,
            )
            run(call, tables, values.shape, groups)
    return output


def _check_tables(input: Tensor, tables: Sequence[Tensor]) -> None:
    """Raise ValueError where the tables do not go with the input."""
    if len(tables) not in (4, 5):
        raise ValueError(f"tables: expected the 4 or 5 that `tables` makes, got {len(tables)}")
    weights = tables[2]
    if weights.device != input.device:
        raise ValueError(f"tables: expected on the device of input, {input.device}, got {weights.device}")
    if weights.dtype != input.dtype or (weights.dim() == 4 and input.dtype != torch.float32):
        raise ValueError(f"tables: expected tables made for {input.dtype}, got {weights.dtype}; make them anew")


def _run_gather(call: Call, tables: Sequence[Tensor], values_shape: Sequence[int], groups: int) -> None:
    """Run the gather kernel with the tile that the shapes lead to."""
    from fxdbsr.kernels import triton_gather

    bo, bc = values_shape[1:3]
    steps, *split, lanes, depth = tables[2].shape
    unions = tables[3].shape[0]
    precision = "3xtf32" if split else precision_of(call.input.dtype)
    device = _device(call.input.device)
    taps = prod(call.kernel_size)
    tile, splits = choose_tile(call.pixels, unions, steps, lanes, depth, taps, precision, *device)
    partial = None
    if splits > 1:
        size = (splits, call.output.numel())
        partial = torch.empty(size, dtype=torch.float32, device=call.input.device)
    width = entry_width(call.input.shape[1], bc, groups, depth)
    run = run_length(call.output.shape[1], bo, groups)
    triton_gather.launch(call, tables, partial, width, run, INPUT_PRECISION[precision], tile)


def _run_bitmask(call: Call, tables: Sequence[Tensor], values_shape: Sequence[int], groups: int) -> None:
    """Run the bitmask kernel."""
    from fxdbsr.kernels import triton_bitmask

    bo, bc = values_shape[1:3]
    precision = precision_of(call.input.dtype)
    # ieee products only where tf32 was switched off after conversion: slow, but right
    config = BITMASK_CONFIGS["16" if precision == "16" else "tf32", bo, bc]
    tile = adapt(config, bc, prod(call.kernel_size), _device(call.input.device)[1])
    triton_bitmask.launch(call, tables, INPUT_PRECISION[precision], tile)


def _images_per_launch(input: Tensor, output: Tensor) -> int:
    """Images that fit 32-bit offsets at a time."""
    batch = max(input.shape[0], 1)
    for name, tensor in (("input", input), ("output", output)):
        if tensor.numel() // batch >= LIMIT:
            raise ValueError(f"{name}: expected fewer than 2**31 elements an image, got {tuple(tensor.shape)}")
    largest = max(input.numel(), output.numel()) // batch
    return max(1, min(batch, (LIMIT - 1) // max(largest, 1)))


@cache
def _installed() -> bool:
    try:
        return find_spec("triton") is not None
    except (ImportError, ValueError):  # sys.modules["triton"] is None or has no spec
        return False


def _interpreted() -> bool:
    """True where the kernels were imported with TRITON_INTERPRET=1."""
    import triton

    from fxdbsr.kernels import triton_gather

    return not isinstance(triton_gather.gather_kernel, triton.JITFunction)


@cache
def _device(device: torch.device) -> tuple[int, str]:
    """Streaming multiprocessors and "cuda:<capability>" or "hip:<arch>"; an H200's for the interpreter."""
    if device.type != "cuda":
        return 132, "cuda:90"
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.multi_processor_count, f"hip:{properties.gcnArchName.split(':')[0]}"
    return properties.multi_processor_count, f"cuda:{properties.major}{properties.minor}"
