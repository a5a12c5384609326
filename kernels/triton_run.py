"""The Triton engine at call time: from an input and the tables to launches of a kernel.

Nothing here waits for the GPU: what a launch needs to know stands in the shapes of the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fxdbsr.kernels.geometry import empty_output, output_size, passes_maxima
from fxdbsr.kernels.pool import max_pool
from fxdbsr.kernels.triton_call import Call
from fxdbsr.kernels.triton_configs import Tile, bitmask_tile
from fxdbsr.kernels.triton_device import device_of
from fxdbsr.kernels.triton_pack import run_length
from fxdbsr.kernels.triton_plan import Choice, entry_width, precision_of, tile_of

LIMIT = 2**31


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
    pool: int = 1,
) -> Tensor:
    """`[N, I, H, W]` to `[N, O, P, Q]`, channels last; arguments as in the operator `torch.ops.fxdbsr.conv`.

    Args:
        pool: side of a max pool that follows, which leaves `[N, O, P // pool, Q // pool]`; 1 for none. In the conv's
            kernel where the gather kernel runs it unsplit, without residual and with an activation that maxima pass;
            otherwise by a kernel of its own.

    Raises:
        ValueError: tables that are not this engine's, or made for another dtype, device or precision; an image
            of 2**31 elements and more.
    """
    choice = _checked(input, tables)
    run = _run_gather if choice.kernel == "gather" else _run_bitmask
    kernel_size = values.shape[3:]
    spatial = output_size(input.shape[2:], kernel_size, stride, padding, dilation)
    images = _images_per_launch(input, out_channels * prod(spatial))
    pixels = min(images, input.shape[0]) * prod(size // pool * pool for size in spatial)
    may = residual is None and passes_maxima(activation, negative_slope)
    inside = pool if may and _pools(choice, tables, pixels, kernel_size, input.device) else 1
    output = empty_output(input, out_channels, [size // inside for size in spatial])
    input = input.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
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
                inside,
            )
            run(call, tables, choice, values.shape, groups)
    return max_pool(output, pool // inside)


def _checked(input: Tensor, tables: Sequence[Tensor]) -> Choice:
    """The choice that the tables hold; ValueError where they do not go with the input."""
    if len(tables) not in (5, 6):
        raise ValueError(f"tables: expected the 5 or 6 that `tables` makes, got {len(tables)}")
    choice, weights = Choice.of(tables[0].shape), tables[3]
    if weights.device != input.device:
        raise ValueError(f"tables: expected on the device of input, {input.device}, got {weights.device}")
    if weights.dtype != input.dtype:
        raise ValueError(f"tables: expected tables made for {input.dtype}, got {weights.dtype}; make them anew")
    if choice.precision == "tf32" and precision_of(input.dtype) == "ieee":
        raise ValueError(
            "tables: they were made for tf32, which torch.backends.cudnn no longer allows for convs; convert anew"
        )
    return choice


def _pools(choice: Choice, tables: Sequence[Tensor], pixels: int, kernel: Sequence[int], device: torch.device) -> bool:
    """True where the conv's own kernel can pool: the gather kernel, which is not asked for partial sums."""
    if choice.kernel != "gather":
        return False
    tile, splits = _tile(choice, tables, pixels, kernel, device)
    spills = choice.precision == "ieee" and tile.pixels == tile.outputs == 64  # by Triton 3.6
    return splits == 1 and not spills


def _tile(
    choice: Choice, tables: Sequence[Tensor], pixels: int, kernel: Sequence[int], device: torch.device
) -> tuple[Tile, int]:
    """The tile of the gather kernel that the shapes lead to, and the splits of the reduction."""
    steps, *_, lanes, depth = tables[3].shape
    model = device_of(device)
    sizes = (pixels, tables[4].shape[0], steps, lanes, depth, prod(kernel))
    return tile_of(choice, *sizes, model.processors, model.target)


def _run_gather(call: Call, tables: Sequence[Tensor], choice: Choice, values_shape: Sequence[int], groups: int) -> None:
    """Run the gather kernel with the tile that the shapes lead to."""
    from fxdbsr.kernels import triton_gather

    bo, bc = values_shape[1:3]
    tile, splits = _tile(choice, tables, call.pixels, call.kernel_size, call.input.device)
    partial = None
    if splits > 1 and call.pool == 1:
        # of its own for each call: calls on several streams may overlap, and CUDA graphs keep their own pool
        size = (splits, call.output.numel())
        partial = torch.empty(size, dtype=torch.float32, device=call.input.device)
    width = entry_width(call.input.shape[1], bc, groups, tables[3].shape[-1])
    run = run_length(call.output.shape[1], bo, groups)
    triton_gather.launch(call, tables[1:], partial, width, run, choice.precision, tile)


def _run_bitmask(
    call: Call, tables: Sequence[Tensor], choice: Choice, values_shape: Sequence[int], groups: int
) -> None:
    """Run the bitmask kernel."""
    from fxdbsr.kernels import triton_bitmask

    bo, bc = values_shape[1:3]
    tile = bitmask_tile(choice.precision, (bo, bc), prod(call.kernel_size))
    triton_bitmask.launch(call, tables[1:], choice.precision, tile)


def _images_per_launch(input: Tensor, outputs: int) -> int:
    """Images that fit 32-bit offsets at a time; `outputs`: numbers in the output of one."""
    batch = max(input.shape[0], 1)
    inputs = input.numel() // batch
    for name, numel in (("input", inputs), ("output", outputs)):
        if numel >= LIMIT:
            raise ValueError(f"{name}: expected fewer than 2**31 elements an image, got {numel}")
    return max(1, min(batch, (LIMIT - 1) // max(inputs, outputs, 1)))
