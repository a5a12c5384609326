"""What the layers of a model read and make of channels: convs, linear layers, norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from torch.nn.modules.instancenorm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d

from fxdbsr.channels.values import UNKNOWN, Dim, Size, Value, after_window
from fxdbsr.nn.scaled import ScaledLayer, plain_type, why_unscalable
from fxdbsr.nn.shrink import from_constants, ignores_border, norm_constant, out_in, whole_grid

BATCH_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d, nn.SyncBatchNorm)
CHANNELWISE = (*BATCH_NORMS, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, nn.GroupNorm, nn.PReLU)


@dataclass
class Link:
    """One call of a conv or linear layer.

    Attributes:
        layer: the layer.
        groups: of the conv, 1 for others.
        input: the value that it reads, one label for each of its input channels; None where not known.
        output: labels of its output channels.
        constant: `[O]` float64, what they hold, NaN where not known.
        nonzero: `[O, I/groups]` bool, the weights that are not zero at every tap.
        reads: the same, but for constants that the bias can absorb.
    """

    layer: nn.Module
    groups: int
    input: Value | None
    output: Tensor
    constant: Tensor
    nonzero: Tensor
    reads: Tensor

    def spread(self, need: Tensor, root: Tensor) -> None:
        """Mark in `need [variables]` what the needed outputs read.

        Groups stay equal: each that stays keeps as many inputs, and as many outputs, as the one that needs most.
        """
        outputs = self.output.view(self.groups, -1)
        if self.input is None:
            if self.groups > 1 and need[root[outputs]].any():
                fill(need, root, outputs)
            return
        inputs = self.input.labels.view(self.groups, -1)
        read = (self.reads.view(*outputs.shape, -1) & need[root[outputs]][..., None]).any(1)
        need[root[inputs[read]]] = True
        if self.groups > 1:
            alive = need[root[inputs]].any(1) | need[root[outputs]].any(1)
            fill(need, root, inputs[alive])
            fill(need, root, outputs[alive])


def fill(need: Tensor, root: Tensor, labels: Tensor) -> None:
    """Mark in `need` as many of each row of `labels [groups, n]` as of the row with most, at least one."""
    while len(labels):
        have = need[root[labels]]
        count = have.sum(1)
        missing = max(int(count.max()), 1) - count
        if not missing.any():
            return
        rank = (~have).cumsum(1)
        need[root[labels[~have & (rank <= missing[:, None])]]] = True


def is_layer(module: nn.Module | None) -> bool:
    """True for conv and linear layers that compute what their class says."""
    if module is None or plain_type(type(module)) is None:
        return False
    return isinstance(module, ScaledLayer) or not why_unscalable(module)


def is_channelwise(module: nn.Module | None, x: Any) -> bool:
    """True for norms and the like that treat each channel of `x` (a group of them, for GroupNorm) for itself."""
    if type(module) not in CHANNELWISE or not isinstance(x, Value) or x.axis != 1 or x.flat:
        return False
    if isinstance(module, nn.PReLU):
        return len(x.labels) == module.num_parameters > 1
    if isinstance(module, nn.GroupNorm):
        return len(x.labels) == module.num_channels
    known = not module.training or isinstance(module, InstanceNorm1d | InstanceNorm2d | InstanceNorm3d)  # type: ignore
    return known and len(x.labels) == module.num_features  # type: ignore[union-attr]


def input_of(layer: nn.Module, x: Any, channels: int) -> Value | None:
    """`x` with one label for each of the `channels` that `layer` reads, or None where they cannot be told."""
    if not isinstance(x, Value):
        return None
    if isinstance(layer, nn.Linear):
        last = x.axis == -1 if x.shape is None else x.axis == len(x.shape) - 1
        if not last or channels % len(x.labels):
            return None
        times = channels // len(x.labels)
        return x.take(torch.arange(len(x.labels)).repeat_interleave(times)) if times == 1 or x.flat else None
    fits = x.axis == 1 and x.rank == out_in(layer).dim() and not x.flat and len(x.labels) == channels
    return x if fits else None


def link_of(layer: nn.Module, x: Value | None, output: Tensor, calls: int) -> Link:
    """The call of `layer`, one of `calls`, on `x` (as `input_of` gives it), whose outputs are labelled `output`."""
    weight, sizes = out_in(layer), whole_grid(layer)
    nonzero = (weight.flatten(2).ne(0).any(2) if weight.dim() > 2 else weight.ne(0)).cpu()
    held = torch.full((sizes.in_channels,), UNKNOWN, dtype=torch.float64) if x is None else x.constant
    if not ignores_border(layer):
        held = held.where(held == 0, UNKNOWN)
    by_group = held.view(sizes.groups, -1)
    grouped = nonzero.unflatten(0, (sizes.groups, -1))
    moving = (grouped & by_group.isnan()[:, None]).any(2).flatten()
    constant = from_constants(layer, by_group.nan_to_num()).masked_fill(moving, UNKNOWN)
    if isinstance(layer.bias, Tensor):
        constant = constant + layer.bias.detach().double().cpu()
    absorbed = by_group == 0 if calls > 1 else ~by_group.isnan()
    reads = (grouped & ~absorbed[:, None]).flatten(0, 1)
    return Link(layer, sizes.groups, x, output, constant, nonzero, reads)


def output_of(link: Link, x: Any, source: str, name: str) -> Value:
    """What is known of the result of `link`, the node `name`, which reads `x`, the node `source`."""
    layer, number = link.layer, len(link.output)
    taps = out_in(layer).dim() - 2
    shape = x.shape if isinstance(x, Value) else None
    if not taps and shape is None:
        return Value(link.output, link.constant, -1, None)
    if not taps:
        assert shape is not None
        return Value(link.output, link.constant, len(shape) - 1, (*shape[:-1], number))
    shape = shape or tuple(Size(source, i) for i in range(2 + taps))
    size = tuple(_side(layer, i, n) or Size(name, 2 + i) for i, n in enumerate(shape[2:]))
    return Value(link.output, link.constant, 1, (shape[0], number, *size))


def _side(conv: Any, i: int, n: Dim) -> Dim | None:
    """Size of the output of `conv` along its spatial axis `i`, `n` in its input; None for transposed convs."""
    if conv.transposed:
        return None
    if conv.padding == "same":
        return n
    padding = 0 if conv.padding == "valid" else conv.padding[i]
    return after_window(n, conv.kernel_size[i], conv.stride[i], padding, conv.dilation[i])


def constant_of(module: Any, held: Tensor) -> Tensor:
    """`[C]` float64: what the channelwise `module` makes of inputs that hold `held` everywhere, NaN if not known."""
    if isinstance(module, nn.PReLU):
        return torch.where(held < 0, held * module.weight.detach().double().cpu(), held)
    if isinstance(module, BATCH_NORMS):
        return norm_constant(module, held)
    zero = held == 0  # of other constants rounding makes something else than the shift
    if isinstance(module, nn.GroupNorm):
        sets = zero.view(module.num_groups, -1)
        zero = sets.all(1, keepdim=True).expand_as(sets).flatten()
    elif module.running_mean is not None:
        return norm_constant(module, held)
    shift = torch.zeros_like(held) if module.bias is None else module.bias.detach().double().cpu()
    return torch.where(zero, shift, UNKNOWN)
