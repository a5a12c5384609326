"""torch's own conv with its epilogue, in as few kernels as torch can be called for.

    y = activation(conv(x, weight) + bias + residual)

cuDNN adds bias and residual and applies a ReLU in the conv's own kernel, if it is asked by
`torch.cudnn_convolution_relu` or `torch.cudnn_convolution_add_relu`; `F.conv2d` adds the bias in a kernel of its
own, and residual and activation are two more. Where Triton is installed, one kernel does what cuDNN does not fuse
(`triton_epilogue`). A network's first conv, of few input channels, has a kernel of its own (`triton_stem`), and so have
convs of few channels a group (`triton_grouped`). Where a compiler sees the call, the plain form is left to it: it fuses
what follows a conv by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxdbsr.kernels.geometry import output_size
from fxdbsr.kernels.plain import is_plain, runs_triton
from fxdbsr.kernels.pool import max_pool
from fxdbsr.kernels.reference import activate

FEW = 4  # input channels
FUSED_DTYPES = (torch.float16, torch.float32)

Geometry = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups


def why_unfused(device: torch.device, dtype: torch.dtype, axes: int, groups: int, activation: str) -> str | None:
    """A sentence that says why cuDNN cannot run conv and epilogue as one kernel; None where it can be asked to."""
    if device.type != "cuda" or torch.version.hip:
        return f"cuDNN is not for {device.type}" if device.type != "cuda" else "cuDNN is not for AMD GPUs"
    if activation != "relu":
        return f"cuDNN fuses ReLU, not {activation}"
    if axes != 2 or groups != 1:
        return f"2-d convs of one group are fused, this one has {axes} axes and {groups} groups"
    if dtype not in FUSED_DTYPES:
        return f"float16 and float32 are fused, not {str(dtype).removeprefix('torch.')}"
    return None


def layout(weight: Tensor, groups: int) -> list[Tensor]:
    """The dense weight as the device's conv reads it, so that no call has to copy it.

    Beside it, for few channels a group on a GPU, the same as `triton_grouped` reads it.
    """
    if not weight.is_cuda or weight.dim() != 4:
        return [weight]
    found = [weight.contiguous(memory_format=torch.channels_last)]
    if groups > 1 and runs_triton(weight.device):
        from fxdbsr.kernels import triton_grouped

        if triton_grouped.why_not_weight(weight, groups) is None:
            found.append(triton_grouped.spread(weight, groups))
    return found


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    negative_slope: float,
    pool: int = 1,
    spread: Tensor | None = None,
) -> Tensor:
    """`[N, I, *size]` to `[N, O, *out]`; `residual` has the shape of the output or broadcasts with it.

    Args:
        pool: side of a max pool that follows an activation that never falls; the first conv's kernel takes it in.
        spread: the weight a second time, where `layout` gave one.
    """
    geometry = ([*stride], [*padding], [*dilation], groups)
    axes = weight.dim() - 2
    function = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    if is_plain(input, weight, bias, residual) and input.is_cuda:
        if _is_stem(input, weight, residual, geometry):
            from fxdbsr.kernels import triton_stem

            return triton_stem.conv(input, weight, bias, *geometry[:3], activation, negative_slope, pool)
        if spread is not None and _is_grouped(input, weight, residual, geometry):
            from fxdbsr.kernels import triton_grouped

            return max_pool(triton_grouped.conv(input, spread, bias, *geometry, activation, negative_slope), pool)
        y = _in_one_kernel(input, weight, bias, residual, geometry, activation)
        if y is not None:
            return max_pool(y, pool)
        if runs_triton(input.device) and axes == 2 and (bias is not None or residual is not None):
            y = _in_two_kernels(input, weight, bias, residual, geometry, activation, negative_slope)
            return max_pool(y, pool)
    y = function(input, weight, bias, *geometry)
    return max_pool(activate(y if residual is None else y + residual, activation, negative_slope), pool)


def _is_stem(input: Tensor, weight: Tensor, residual: Tensor | None, geometry: Geometry) -> bool:
    """True where the kernel for few input channels runs the conv."""
    if weight.shape[1] > FEW or not runs_triton(input.device):
        return False
    from fxdbsr.kernels import triton_stem

    return triton_stem.why_not(input, weight, residual, *geometry) is None


def _is_grouped(input: Tensor, weight: Tensor, residual: Tensor | None, geometry: Geometry) -> bool:
    """True where the kernel for few channels a group runs the conv."""
    from fxdbsr.kernels import triton_grouped

    return triton_grouped.why_not(input, weight, residual, *geometry) is None


def _in_one_kernel(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    activation: str,
) -> Tensor | None:
    """The conv with its epilogue by cuDNN; None where it has no such kernel."""
    if why_unfused(input.device, input.dtype, weight.dim() - 2, geometry[3], activation) is not None:
        return None
    return _fused(input, weight, bias, residual, geometry) if torch.backends.cudnn.enabled else None


def _in_two_kernels(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """torch's conv, then its epilogue in one pass over the output."""
    from fxdbsr.kernels import triton_epilogue

    y = F.conv2d(input, weight, None, *geometry)
    if triton_epilogue.why_not_in_place(y, residual) is None:
        return triton_epilogue.finish_in_place(y, bias, residual, activation, negative_slope)
    y = y if bias is None else y + bias.view(-1, 1, 1)
    return activate(y if residual is None else y + residual, activation, negative_slope)


_UNABLE: set[tuple[object, ...]] = set()  # convs for which cuDNN has no fused kernel on this machine


def _fused(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: Geometry
) -> Tensor | None:
    """The conv with bias, residual and ReLU as one kernel; None where cuDNN has none, or the residual broadcasts."""
    key = (input.device, input.dtype, weight.shape, residual is None, *map(tuple, geometry[:3]))
    if key in _UNABLE:
        return None
    try:
        if residual is None:
            return torch.cudnn_convolution_relu(input, weight, bias, *geometry)
        spatial = output_size(input.shape[2:], weight.shape[2:], *geometry[:3])
        if residual.dtype == input.dtype and residual.shape == (input.shape[0], weight.shape[0], *spatial):
            return torch.cudnn_convolution_add_relu(input, weight, residual, 1.0, bias, *geometry)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # "unable to find an engine"; where something else is wrong, the plain conv says so as well
        _UNABLE.add(key)
    return None
