"""The Triton engine: block-sparse conv on a GPU.

    y = activation(conv(x, unpack(values)) + bias + residual)

This file is the engine's face: what it can run and what it prepares. `triton_forms` lists the forms
in which a conv can run, `triton_pack` makes a form's tables, `triton_plan` chooses tiles, `triton_gather` and
`triton_bitmask` hold the kernels, `triton_run` launches them, `triton_roofline` says whether dense is faster. The
tables carry a copy of the weights in the order in which the kernel reads them: after a change of `values`, make
them anew. With TRITON_INTERPRET=1 in the environment before this module is imported, it runs, slowly, on CPU
tensors.

float32 follows cuDNN's switch for convs (`torch.backends.cudnn.conv.fp32_precision`, formerly `allow_tf32`) as
it stands when the tables are made: tf32 where it is on, which is PyTorch's default, ieee otherwise. Sums are
float32 always.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from math import prod

import torch
from torch import Tensor

from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.triton_configs import tiles
from fxdbsr.kernels.triton_device import device_of
from fxdbsr.kernels.triton_forms import BITMASK_ROWS, ROWS, TALLEST, Form, by_work, why_not_bitmask
from fxdbsr.kernels.triton_pack import pack
from fxdbsr.kernels.triton_pack_bitmask import pack_bitmask
from fxdbsr.kernels.triton_plan import DTYPES, KERNELS, Choice, packed_weights, precision_of
from fxdbsr.kernels.triton_rows import column_masks
from fxdbsr.kernels.triton_run import conv

__all__ = ["conv", "layout", "packed_weights", "tables", "why_not"]


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
    kernel: str | None = None,
    precision: str | None = None,
    tile: int | None = None,
    splits: int = 1,
    pixels: int = 0,
) -> list[Tensor]:
    """What `conv` needs beside the values, as `triton_gather` or `triton_bitmask` describes it; for any input size.

    The last six arguments are what `triton_tune.candidates` lists and what `triton_tune.tune` finds.

    Args:
        rows_per_union: rows of blocks that share an activation tile, 1, 2 or 4; None lets the planner choose.
        kernel: "gather", or "bitmask" where `why_not_bitmask` allows it; None lets the planner choose.
        precision: "3xtf32" for float32 accuracy on tensor cores (gather kernel); None as the module says.
        tile: index into `triton_configs.tiles` for calls with `pixels` output pixels; None lets the planner choose.
        splits: splits of the reduction that go with `tile`.

    Raises:
        ValueError: the kernel cannot run the conv; an unknown kernel, precision or tile.
    """
    form = _form(grid, values, crow_indices, col_indices, rows_per_union, kernel, precision)
    make = pack if form.kernel == "gather" else pack_bitmask
    made = make(grid, values, crow_indices, col_indices, form)
    if tile is not None:
        target, taps = device_of(values.device).target, prod(grid.kernel_size)
        known = tiles(target, form.precision, made[4].shape[1], made[3].shape[-1], taps)
        if form.kernel != "gather" or not 0 <= tile < len(known):
            raise ValueError(f"tile: expected one of the {len(known)} tiles of the gather kernel, got {tile}")
        made[0] = Choice("gather", form.precision, tile, splits, pixels).as_table(values.device)
    return made


def _form(
    grid: BlockGrid,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    rows_per_union: int | None,
    kernel: str | None,
    precision: str | None,
) -> Form:
    """The form asked for, what was left open chosen by work."""
    device = device_of(values.device)
    resolved = precision_of(values.dtype) if precision is None else precision
    if precision is not None:
        reason = why_not_precise(precision, values.dtype, kernel)
        if reason is not None:
            raise ValueError(f"precision: {reason}")
    if resolved == "tf32" and device.target.startswith("hip") and device.target != "hip:gfx942":
        resolved = "ieee"  # no other AMD GPU multiplies tf32
    if kernel is not None and kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {KERNELS}, got {kernel!r}")
    if kernel == "bitmask":
        reason = why_not_bitmask(grid, resolved)
        if reason is not None:
            raise ValueError(f"kernel: {reason}")
        return Form("bitmask", BITMASK_ROWS, resolved)
    if rows_per_union is not None:
        _check_rows(grid, rows_per_union)
        return Form("gather", rows_per_union, resolved)
    columns = column_masks(crow_indices.tolist(), col_indices.tolist())
    found = by_work(grid, columns, resolved, values.element_size(), device)
    return next(form for form in found if kernel in (None, form.kernel))


def _check_rows(grid: BlockGrid, rows_per_union: int) -> None:
    if rows_per_union not in ROWS:
        raise ValueError(f"rows_per_union: expected 1, 2 or 4, got {rows_per_union}")
    height = min(grid.block_size[0], grid.out_channels // grid.groups)
    if rows_per_union > 1 and rows_per_union * height > TALLEST:
        raise ValueError(f"rows_per_union: expected at most {TALLEST} outputs, got {rows_per_union} rows of {height}")


def why_not_precise(precision: str, dtype: torch.dtype, kernel: str | None) -> str | None:
    """A sentence that says why products cannot be formed with `precision`; None where they can."""
    if precision != "3xtf32":
        return f"expected 3xtf32 or None, got {precision!r}"
    if dtype != torch.float32:
        return f"3xtf32 is for float32, the weights are {dtype}"
    if kernel == "bitmask":
        return "3xtf32 is for the gather kernel, not bitmask"
    if torch.version.hip:
        return "3xtf32 runs on NVIDIA GPUs"
    return None


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
