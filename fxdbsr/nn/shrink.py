"""Layers with fewer channels: what a layer makes of constant inputs, and its tensors cut to the channels kept.

Sums are taken in float64 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxdbsr.blocks import BlockGrid
from fxdbsr.nn.scaled import ScaledLayer


@dataclass(frozen=True)
class Cut:
    """What is left of a layer, as positions.

    Attributes:
        outputs: output channels that stay.
        inputs: input channels that stay.
        groups: number of groups that stay; each keeps equally many outputs, and equally many inputs.
        absorbed: `[O]` float64, what the inputs that go add to each old output.
    """

    outputs: Tensor
    inputs: Tensor
    groups: int
    absorbed: Tensor | None = None


def whole_grid(layer: nn.Module) -> BlockGrid:
    """The layer's weight as one block a group."""
    shape = tuple(layer.weight.shape)  # type: ignore[arg-type]
    groups, transposed = getattr(layer, "groups", 1), getattr(layer, "transposed", False)
    return BlockGrid.of(shape, (None, None), groups, transposed)


def out_in(layer: nn.Module) -> Tensor:
    """The layer's weight as `[O, I/groups, *kernel]`, without gradient."""
    assert isinstance(layer.weight, Tensor)
    return whole_grid(layer).to_out_in(layer.weight.detach())


def ignores_border(layer: nn.Module) -> bool:
    """True where a constant input gives a constant output: nothing is padded with zeros."""
    if isinstance(layer, nn.Linear):
        return True
    if getattr(layer, "transposed", True):
        return False
    return layer.padding_mode != "zeros" or layer.padding == "valid" or _all_zero(layer.padding)


def _all_zero(padding: object) -> bool:
    return isinstance(padding, tuple) and not any(padding)


def from_constants(layer: nn.Module, held: Tensor) -> Tensor:
    """`[O]` float64: what inputs that hold `held [groups, I/groups]` everywhere add to the outputs, without bias."""
    weight = out_in(layer).unflatten(0, (held.shape[0], -1))
    columns = held.ne(0).any(0).nonzero().flatten()
    if not len(columns):
        return held.new_zeros(weight.shape[0] * weight.shape[1])
    weight = weight[:, :, columns.to(weight.device)]
    sums = weight.flatten(3).sum(3, dtype=torch.float64) if weight.dim() > 3 else weight.double()
    added: Tensor = (sums.cpu() @ held[:, columns, None]).flatten()
    return added


def norm_constant(norm: _BatchNorm, held: Tensor) -> Tensor:
    """`[C]` float64: the norm's output, in eval mode, for inputs that hold `held` everywhere, NaN if unknown."""
    if norm.running_mean is None or norm.running_var is None:
        return torch.full_like(held, float("nan"))
    y = (held - norm.running_mean.double().cpu()) * (norm.running_var.double().cpu() + norm.eps).rsqrt()
    if not norm.affine:
        return y
    factor, shift = norm.weight.detach().double().cpu(), norm.bias.detach().double().cpu()
    return torch.where(factor == 0, shift, y * factor + shift)


def cut_weight(weight: Tensor, cut: Cut) -> Tensor:
    """What is left of `weight [O, I/groups, ...]`, as `[O', I'/groups', ...]`."""
    outputs = cut.outputs.to(weight.device).view(cut.groups, -1, 1)
    inputs = cut.inputs.to(weight.device).view(cut.groups, 1, -1) % weight.shape[1]
    return weight[outputs, inputs].flatten(0, 1)


def cut_grid(grid: BlockGrid, cut: Cut) -> BlockGrid:
    """`grid` over what is left of the weight."""
    out, in_ = len(cut.outputs), len(cut.inputs)
    pair = (in_, out // cut.groups) if grid.transposed else (out, in_ // cut.groups)
    return BlockGrid.of((*pair, *grid.kernel_size), grid.block_size, cut.groups, grid.transposed)


def kept_weights(grid: BlockGrid, nonzero: Tensor) -> int:
    """Weights in the blocks of `grid` that hold one that is not zero; `nonzero [O, I/groups]` says which are not."""
    flat = replace(grid, kernel_size=(), transposed=False)
    return int(grid.numel()[flat.nonzero(nonzero)].sum())


def cut_layer_(layer: nn.Module, cut: Cut) -> None:
    """Cut the channels of a conv or linear layer, in place; it remembers the grid it had in `dense_grid`."""
    old = layer.weight
    assert isinstance(old, Tensor)
    whole = whole_grid(layer)
    grid = layer.grid if isinstance(layer, ScaledLayer) else whole
    new = cut_grid(grid, cut)
    weight = new.from_out_in(cut_weight(out_in(layer), cut)).contiguous()
    bias = None if layer.bias is None else layer.bias.detach().double()  # type: ignore[operator]
    if cut.absorbed is not None and cut.absorbed.any():
        extra = cut.absorbed.to(old.device)
        bias = extra if bias is None else bias + extra
    if bias is not None:
        bias = bias[cut.outputs.to(old.device)].to(old.dtype)
        layer.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    if not hasattr(layer, "dense_grid"):
        layer.dense_grid = grid  # type: ignore[assignment]
    names = ("out_features", "in_features") if isinstance(layer, nn.Linear) else ("out_channels", "in_channels")
    for name, number in zip(names, (new.out_channels, new.in_channels), strict=True):
        setattr(layer, name, number)
    if not isinstance(layer, nn.Linear):
        layer.groups = cut.groups  # type: ignore[assignment]
    if isinstance(layer, ScaledLayer):
        layer.grid = new
        free_blocks_(layer)


def free_blocks_(layer: ScaledLayer) -> None:
    """Set every scale to 1 and every mask on: the weight itself holds the zeros."""
    shape, weight = layer.grid.shape, layer.weight
    layer.scale = nn.Parameter(torch.ones(shape, dtype=weight.dtype, device=weight.device), requires_grad=False)
    layer.register_buffer("mask", torch.ones(shape, dtype=torch.bool, device=weight.device))


def cut_channelwise_(module: nn.Module, keep: Tensor) -> None:
    """Cut the channels of a norm, or of another module with a number for each, in place, to those at `keep`."""
    number = len(keep)
    if isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * number // module.num_channels
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.dim() == 1:
            cut = tensor.detach()[keep.to(tensor.device)]
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(name, nn.Parameter(cut, requires_grad=tensor.requires_grad))
            else:
                module.register_buffer(name, cut)
    for name in ("num_features", "num_channels", "num_parameters"):
        if hasattr(module, name):
            setattr(module, name, number)


def permute_layer_(layer: nn.Module, outputs: Tensor, inputs: Tensor | None) -> None:
    """Put the channels of a conv or linear layer into another order, in place; only one without groups moves.

    The scales must be folded.
    """
    moves = [index is not None and not torch.equal(index, torch.arange(len(index))) for index in (outputs, inputs)]
    if not any(moves):
        return
    grid, weight = whole_grid(layer), out_in(layer)
    if moves[0]:
        weight = weight[outputs.to(weight.device)]
    if moves[1] and inputs is not None:
        weight = weight[:, inputs.to(weight.device)]
    layer.register_parameter("weight", nn.Parameter(grid.from_out_in(weight).contiguous(), requires_grad=False))
    if moves[0] and isinstance(layer.bias, Tensor):
        bias = layer.bias.detach()[outputs.to(weight.device)]
        layer.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
    if isinstance(layer, ScaledLayer):
        free_blocks_(layer)


def permute_channelwise_(module: nn.Module, order: Tensor) -> None:
    """Put the channels of a norm, or of another module with a number for each, into another order, in place."""
    if not torch.equal(order, torch.arange(len(order))):
        cut_channelwise_(module, order)
