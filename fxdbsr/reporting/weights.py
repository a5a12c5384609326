"""The weight behind the calls of a layer: its blocks, what is stored for it, its kernel, and why that one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fxdbsr.blocks import BlockGrid
from fxdbsr.calls import FUNCTIONS
from fxdbsr.nn.lift import why_unpacked
from fxdbsr.nn.packed import PackedConv
from fxdbsr.nn.scaled import ScaledFunction, ScaledLayer, plain_type, why_unscalable
from fxdbsr.nn.scaling import effective_scale
from fxdbsr.reporting.observe import Call

TRAINING = "training form: convert drops the zero blocks"


@dataclass
class Weight:
    """A layer's weight.

    Attributes:
        name, kind, weight_shape, kernel, reason: as in `LayerRow`.
        dense: the weight where it exists in full, None where it is packed.
        stored: every tensor that is kept; of a packed layer values, crow_indices, col_indices, bias.
        grid: its blocks, or None.
        alive: `[rows, columns]` bool, the blocks that are not zero, where there is a grid.
        dense_grid: the blocks, or the whole weight as one, as they were before `convert` removed channels, of
            `weight_shape`; None where it removed none.
        calls: of the layer.
        blocked: False where the grid is the engine's own and not the user's.
    """

    name: str
    kind: str
    dense: Tensor | None
    weight_shape: tuple[int, ...]
    stored: list[Tensor]
    kernel: str
    reason: str
    grid: BlockGrid | None = None
    alive: Tensor | None = None
    dense_grid: BlockGrid | None = None
    calls: list[Call] = field(default_factory=list)
    blocked: bool = True


def weight_of_module(call: Call, name: str, parameters: dict[int, str], unblocked: str) -> Weight:
    """The weight of the module that `call` calls, named `name`.

    Args:
        parameters: names of the model's parameters by their ids.
        unblocked: the reason of a layer that could have block scales and has none.
    """
    layer = call.layer
    if isinstance(layer, PackedConv):
        stored = [t for t in (layer.values, layer.crow_indices, layer.col_indices, layer.bias) if t is not None]
        kind = kind_of(layer.dense_grid)
        reason = "; ".join(part for part in (layer.reason, layer.kept_channels) if part)
        dense = layer.dense_grid
        row = Weight(name, kind, None, dense.weight_shape, stored, layer.engine, reason, dense_grid=dense)
        row.grid, row.alive, row.blocked = layer.grid, _kept_of_packed(layer), layer.blocked
        return row
    if isinstance(layer, ScaledFunction):
        weight, scale, mask, bias = (*call.args[1:], None)[:4]
        stored = [weight] if bias is None else [weight, bias]
        alive = effective_scale(scale.detach(), mask, layer.form) != 0
        reason = why_unpacked(layer) or TRAINING
        name = parameters.get(id(weight), name)
        kind = layer.function.__name__
        return Weight(name, kind, weight, layer.grid.weight_shape, stored, "dense", reason, layer.grid, alive)
    assert isinstance(layer, nn.Module)
    base = plain_type(type(layer))
    assert base is not None
    kind = base.__name__.lower().replace("transpose", "_transpose")
    found = layer.weight
    assert isinstance(found, Tensor)
    scale_id = id(layer.scale) if isinstance(layer, ScaledLayer) else None
    stored = [parameter for parameter in layer.parameters() if id(parameter) != scale_id]
    row = Weight(name, kind, found, tuple(found.shape), stored, "dense", why_unscalable(layer) or unblocked)
    grid = getattr(layer, "grid", None)
    if isinstance(layer, ScaledLayer):
        row.alive = effective_scale(layer.scale.detach(), layer.mask, layer.form) != 0
        row.reason = why_unpacked(layer) or TRAINING
    elif isinstance(grid, BlockGrid):
        row.alive = grid.nonzero(found)
        row.reason = why_unpacked(layer) or row.reason
    row.grid = grid if row.alive is not None else None
    row.dense_grid = getattr(layer, "dense_grid", None)
    if row.dense_grid is not None:
        row.weight_shape = row.dense_grid.weight_shape
    row.reason = "; ".join(part for part in (row.reason, getattr(layer, "kept_channels", "")) if part)
    return row


def kind_of(grid: BlockGrid) -> str:
    """`LayerRow.kind` of a layer with these blocks."""
    axes = len(grid.kernel_size)
    return f"conv{'_transpose' * grid.transposed}{axes}d" if axes else "linear"


def _kept_of_packed(layer: PackedConv) -> Tensor:
    rows, columns = layer.grid.shape
    if layer.crow_indices.is_meta:
        return torch.empty((rows, columns), dtype=torch.bool, device="meta")
    counts = layer.crow_indices.diff().long()
    row = torch.repeat_interleave(torch.arange(rows, device=counts.device), counts)
    kept = torch.zeros((rows, columns), dtype=torch.bool, device=counts.device)
    kept[row, layer.col_indices.long()] = True
    return kept


def weight_of_function(call: Call, name: str, parameters: dict[int, str], reason: str) -> Weight:
    """The weight of the functional conv `call`, named `name` where it is no parameter of the model."""
    arguments = dict(zip(FUNCTIONS[call.layer][1], call.args, strict=False)) | call.kwargs
    weight, bias = arguments["weight"], arguments.get("bias")
    stored: list[Tensor] = [t for t in (weight, bias) if isinstance(t, nn.Parameter)]
    kind = FUNCTIONS[call.layer][0].__name__.lower().replace("transpose", "_transpose")
    name = parameters.get(id(weight), name)
    return Weight(name, kind, weight, tuple(weight.shape), stored, "dense", reason)
