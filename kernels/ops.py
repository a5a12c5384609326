"""The operator `torch.ops.fxdbsr.conv`: schema, checks, dispatch to an engine, fake, gradient, FLOP formula.

    conv(input [N, I, *size], values [nnz, BO, BC, *kernel], crow_indices [rows + 1], col_indices [nnz],
         bias [O]?, residual [N, O, *out]?, tables, ...) -> [N, O, *out], channels last in memory

computes `activation(conv(input, unpack(values)) + bias + residual)` with the engine named by `engine`.
`tables` is what that engine derived from the indices when the model was converted; no engine may change it.
Engines are imported when first called, so that a missing optional one costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxdbsr.kernels.geometry import ACTIVATIONS, empty_output, output_size, packed_macs
from fxdbsr.kernels.plain import is_transformed
from fxdbsr.kernels.pool import max_pool
from fxdbsr.kernels.triton_plan import packed_weights

ENGINES = ("reference", "triton", "cpu")

_library = torch.library.Library("fxdbsr", "DEF")
_library.define(
    "conv(Tensor input, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor? bias, Tensor? residual,"
    " Tensor[] tables, int in_channels, int out_channels, int[] stride, int[] padding, int[] dilation,"
    " int groups, str activation, float negative_slope, str engine) -> Tensor"
)


@cache
def engine_conv(engine: str) -> Callable[..., Tensor]:
    """The `conv` function of the engine of that name.

    Raises:
        ValueError: no engine has that name.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {ENGINES}, got {engine!r}")
    function: Callable[..., Tensor] = import_module(f"fxdbsr.kernels.{engine}").conv
    return function


def _check(
    input: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    in_channels: int,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> tuple[int, ...]:
    """Raise an error that names the first wrong argument; return the output's spatial size."""
    axes = values.dim() - 3
    if not 1 <= axes <= 3:
        raise ValueError(f"values: expected [nnz, BO, BC, *kernel] with 1 to 3 taps axes, got {values.shape}")
    _check_channels(input, values, in_channels)
    if input.dtype != values.dtype:
        raise TypeError(f"input: expected the dtype of values, {values.dtype}, got {input.dtype}")
    if not input.dtype.is_floating_point:
        raise TypeError(f"input: expected a floating-point dtype, got {input.dtype}")
    for name, tensor in (
        ("values", values),
        ("crow_indices", crow_indices),
        ("col_indices", col_indices),
        ("bias", bias),
        ("residual", residual),
    ):
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{name}: expected on the device of input, {input.device}, got {tensor.device}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"bias: expected [{out_channels}], got {tuple(bias.shape)}")
    spatial = output_size(input.shape[2:], values.shape[3:], stride, padding, dilation)
    if any(n < 1 for n in spatial):
        raise ValueError(f"input: too small for the kernel, {tuple(input.shape)} gives output size {spatial}")
    whole = (input.shape[0], out_channels, *spatial)
    if residual is not None and (residual.shape != whole or residual.dtype != input.dtype):
        raise ValueError(f"residual: expected {whole} {input.dtype}, got {tuple(residual.shape)} {residual.dtype}")
    return spatial


def _check_channels(input: Tensor, values: Tensor, in_channels: int) -> None:
    axes = values.dim() - 3
    if input.dim() != axes + 2 or input.shape[1] != in_channels:
        raise ValueError(f"input: expected [N, {in_channels}] and {axes} more axes, got {tuple(input.shape)}")


@torch.library.impl(_library, "conv", "CompositeExplicitAutograd")
def _conv(
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
    engine: str,
) -> Tensor:
    spatial = _check(
        input,
        values,
        crow_indices,
        col_indices,
        bias,
        residual,
        in_channels,
        out_channels,
        stride,
        padding,
        dilation,
        activation,
    )
    if input.shape[0] == 0:
        return empty_output(input, out_channels, spatial)
    output = engine_conv(engine)(
        input,
        values,
        crow_indices,
        col_indices,
        bias,
        residual,
        tables,
        in_channels,
        out_channels,
        stride,
        padding,
        dilation,
        groups,
        activation,
        negative_slope,
    )
    return channels_last(output)


def channels_last(tensor: Tensor) -> Tensor:
    """`tensor [N, C, *size]` with channels last in memory, copied only where it is not yet so."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    last = tensor.dim() - 1
    return tensor.movedim(1, last).contiguous().movedim(last, 1)


@torch.library.register_fake("fxdbsr::conv", lib=_library)  # type: ignore[untyped-decorator]
def _fake(input: Tensor, values: Tensor, *args: Any) -> Tensor:
    in_channels, out_channels, stride, padding, dilation = args[5:10]
    _check_channels(input, values, in_channels)  # plans of the CPU engine are made from shapes, and trust them
    spatial = output_size(input.shape[2:], values.shape[3:], stride, padding, dilation)
    return empty_output(input, out_channels, spatial)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.tables, ctx.arguments = inputs[:6], inputs[6], inputs[7:15]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    wanted = [need and t is not None for need, t in zip(ctx.needs_input_grad[:6], tensors, strict=True)]
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        y = engine_conv("reference")(*leaves, [], *ctx.arguments)
        sources = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(y, sources, grad))
    return (*(next(found) if w else None for w in wanted), [None] * len(ctx.tables), *[None] * 9)


torch.library.register_autograd("fxdbsr::conv", _backward, setup_context=_setup_context, lib=_library)


def conv(input: Tensor, values: Tensor, *arguments: Any, pool: int = 1) -> Tensor:
    """`torch.ops.fxdbsr.conv`, past the dispatcher where the CPU engine runs and nothing watches operators.

    The dispatcher takes longer than a small conv. The engine checks its arguments itself. Under the transforms of
    torch.func, which take no operator with lists of tensors, the reference runs, as torch's own operators.

    Args:
        pool: side of a max pool that follows; the Triton engine's kernel takes it in where nothing watches.
    """
    engine, unwatched = arguments[-1], not is_watched(input, values, arguments[2], arguments[3])
    if engine == "cpu" and unwatched:
        return max_pool(engine_conv("cpu")(input, values, *arguments[:-1]), pool)
    if engine == "triton" and pool > 1 and unwatched and input.shape[0] > 0:
        checked: tuple[Any, ...] = (*arguments[:4], *arguments[5:10], arguments[11])
        _check(input, values, *checked)
        return channels_last(engine_conv("triton")(input, values, *arguments[:-1], pool=pool))
    if is_transformed():
        return max_pool(engine_conv("reference")(input, values, *arguments[:4], [], *arguments[5:-1]), pool)
    output: Tensor = torch.ops.fxdbsr.conv.default(input, values, *arguments)
    return max_pool(output, pool)


def is_watched(*tensors: Tensor | None) -> bool:
    """True where the operator itself must be seen: by a gradient, a compiler, a mode, a transform or a profiler."""
    return (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or type(tensors[0]) is not Tensor
        or torch._C._is_tracing()
        or is_transformed()
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    )


@register_flop_formula(torch.ops.fxdbsr.conv)
def conv_flops(
    input_shape: Sequence[int],
    values_shape: Sequence[int],
    crow_shape: Sequence[int],
    col_shape: Sequence[int],
    bias_shape: Any,
    residual_shape: Any,
    tables_shape: Any,
    in_channels: int,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    negative_slope: float,
    engine: str,
    **_: Any,
) -> int:
    """FLOPs, two a MAC, that `engine` executes: the packed blocks, or all weights for the reference."""
    return 2 * macs_run(
        values_shape,
        input_shape[0],
        output_size(input_shape[2:], values_shape[3:], stride, padding, dilation),
        in_channels,
        out_channels,
        groups,
        engine,
        tables_shape,
    )


def macs_run(
    values_shape: Sequence[int],
    batch: int,
    spatial: Sequence[int],
    in_channels: int,
    out_channels: int,
    groups: int,
    engine: str,
    tables_shape: Sequence[Sequence[int]] = (),
) -> int:
    """MACs that `engine` executes for an output of `[batch, out_channels, *spatial]`."""
    if engine == "reference":
        return out_channels * (in_channels // groups) * prod(values_shape[3:]) * batch * prod(spatial)
    if engine == "triton":
        return packed_weights(values_shape, tables_shape) * batch * prod(spatial)
    return packed_macs(values_shape, batch, spatial)
