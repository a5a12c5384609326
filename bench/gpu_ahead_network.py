"""Compile ahead what a converted network launches: its real masks, planned without a GPU, launched on meta tensors."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import fxdbsr
from bench.gpu_networks import images, pruned
from bench.gpu_setting import BLOCKS, DTYPES, set_precision
from fxdbsr.kernels import triton as engine
from fxdbsr.kernels.choice import Case
from fxdbsr.kernels.geometry import output_size
from fxdbsr.kernels.triton_roofline import verdict
from fxdbsr.nn.packed import PackedConv
from fxdbsr.passes.plan_engines import seen_inputs


def compile_network(model: str, dtype: str, batch: int, block: str, sparsity: int, masks: str) -> str | None:
    """Compile the kernels of the layers that go sparse, in float32 those of 3xTF32 too; what went wrong, or None."""
    set_precision(dtype)
    failed = []
    with torch.no_grad():
        fast = fxdbsr.convert(pruned(model, BLOCKS[block], sparsity / 100, masks), backend="reference")
        for layer, inputs in seen_inputs(fast, (images(model, 1, False),)).items():
            size = (batch, *layer.size_of(inputs[0])[1:])
            case = replace(layer.case(), dtype=DTYPES[dtype], size=size)
            for precision in (None, "3xtf32") if dtype == "fp32" else (None,):
                try:
                    compile_layer(layer, replace(case, precision=precision))
                except Exception as error:
                    failed.append(f"{model} {dtype} {block} {sparsity} % {case.grid}: {type(error).__name__}: {error}")
    return "; ".join(failed) or None


def compile_layer(layer: PackedConv, case: Case) -> None:
    """Compile the kernel of one layer, if the planner sends it to the engine as that case."""
    geometry = (case.stride, case.padding, case.dilation)
    if engine.why_not(case.grid, *geometry, case.dtype, torch.device("cuda")) is not None:
        return
    form, _ = verdict(case)
    if form is None:
        return
    assert case.size is not None
    grid, size = case.grid, case.size
    packed = (layer.planar_values().to(case.dtype), case.crow_indices, case.col_indices)
    bias = layer.planar_bias()
    tables = [table.to("meta") for table in engine.tables(grid, *packed, *geometry, **form)]

    def image(channels: int, spatial: tuple[int, ...]) -> Tensor:
        x = torch.empty(size[0], channels, *spatial, dtype=case.dtype, device="meta")
        return x.contiguous(memory_format=torch.channels_last)

    values, crow, col = (tensor.to("meta") for tensor in packed)
    output = output_size(size[1:], grid.kernel_size, *geometry)
    engine.conv(
        image(grid.in_channels, size[1:]),
        values,
        crow,
        col,
        None if bias is None else bias.to("meta", case.dtype),
        image(grid.out_channels, output) if case.residual else None,
        tables,
        grid.in_channels,
        grid.out_channels,
        *geometry,
        grid.groups,
        case.activation,
        layer.negative_slope,
        case.pool,
    )
