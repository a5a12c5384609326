"""From what a forward did to rows: blocks, MACs, parameters and bytes of every layer, and of the rest.

The MACs of a dense layer, and `macs_run` of every layer, are half of what `FlopCounterMode` counted in it; those of
a blocked layer's dense form and of its kept blocks are `positions * numel`, where positions say how often the
forward multiplies each weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from fxdbsr.blocks import BlockGrid
from fxdbsr.calls import FUNCTIONS
from fxdbsr.layers import blocked_layers
from fxdbsr.nn.packed import PackedConv, why_unpacked
from fxdbsr.nn.scaled import Blocked, ScaledFunction, ScaledLayer, effective_scale, plain_type, why_unscalable
from fxdbsr.reporting.observe import Call, Observation, Seen, is_layer
from fxdbsr.reporting.rows import LayerRow

TRAINING = "training form: convert drops the zero blocks"


@dataclass
class Tally:
    """The rows of one model.

    Attributes:
        rows: in the order of the first calls.
        other: the row of everything else.
        masks: `[rows, columns]` bool, False where a block is zero, by the name of the row.
        of_module: the row of each module that was called, by the module's id.
        of_function: the row of each functional call, in order.
        seen: what each row was made from.
    """

    rows: list[LayerRow]
    other: LayerRow
    masks: dict[str, Tensor]
    of_module: dict[int, int]
    of_function: list[int]
    seen: list[Seen]


@dataclass
class _Layer:
    """What a row is made from: one weight, its blocks, everything that is stored for it."""

    name: str
    kind: str
    weight: Tensor | None
    weight_shape: tuple[int, ...]
    stored: list[Tensor]
    kernel: str
    reason: str
    grid: BlockGrid | None = None
    alive: Tensor | None = None
    calls: list[Call] = field(default_factory=list)


def tally(model: nn.Module, observed: Observation, function_reasons: list[tuple[str, str]]) -> Tally:
    """Rows for what was `observed` of `model`.

    Args:
        function_reasons: for each functional call, its name in the graph and why it has no block scales.
    """
    names = {id(module): name.replace("_orig_mod.", "") for name, module in model.named_modules()}
    parameters = {id(parameter): name.replace("_orig_mod.", "") for name, parameter in model.named_parameters()}
    has_blocks = any(isinstance(m, Blocked | PackedConv) for m in model.modules())
    unblocked = "not selected" if has_blocks else "not prepared"
    layers: dict[object, _Layer] = {}
    seen: dict[object, Seen] = {}
    of_module, of_function = {}, []
    for one in observed.modules:
        layer = _of_module(one, names[id(one.layer)], parameters, unblocked)
        key = layer.name
        known = layers.setdefault(key, layer)
        known.calls += one.calls
        seen.setdefault(key, Seen(one.layer)).calls.extend(one.calls)
        of_module[id(one.layer)] = list(layers).index(key)
    for one, (name, reason) in zip(observed.functions, function_reasons, strict=True):
        layer = _of_function(one, name, parameters, reason or unblocked)
        key = f"{layer.name}()"
        known = layers.setdefault(key, layer)
        known.calls += one.calls
        seen.setdefault(key, Seen(one.layer)).calls.extend(one.calls)
        of_function.append(list(layers).index(key))
    owners: dict[int, str] = {}
    rows = [_row(layer, owners) for layer in layers.values()]
    masks = {layer.name: layer.alive.cpu() for layer in layers.values() if layer.alive is not None}
    other = _other(model, observed, rows, owners)
    return Tally(rows, other, masks, of_module, of_function, list(seen.values()))


def _of_module(seen: Seen, name: str, parameters: dict[int, str], unblocked: str) -> _Layer:
    layer = seen.layer
    if isinstance(layer, PackedConv):
        stored = [t for t in (layer.values, layer.crow_indices, layer.col_indices, layer.bias) if t is not None]
        kind = f"conv{len(layer.stride)}d"
        shape = layer.grid.weight_shape
        return _Layer(
            name, kind, None, shape, stored, layer.engine, layer.reason, layer.grid, _kept_of_packed(layer)
        )
    if isinstance(layer, ScaledFunction):
        weight, scale, mask, bias = (*seen.calls[0].args[1:], None)[:4]
        stored = [weight] if bias is None else [weight, bias]
        alive = effective_scale(scale.detach(), mask, layer.form) != 0
        reason = why_unpacked(layer) or TRAINING
        name = parameters.get(id(weight), name)
        kind = layer.function.__name__
        return _Layer(name, kind, weight, layer.grid.weight_shape, stored, "dense", reason, layer.grid, alive)
    assert isinstance(layer, nn.Module)
    base = plain_type(type(layer))
    assert base is not None
    kind = base.__name__.lower().replace("transpose", "_transpose")
    found = layer.weight
    assert isinstance(found, Tensor)
    scale_id = id(layer.scale) if isinstance(layer, ScaledLayer) else None
    stored = [parameter for parameter in layer.parameters() if id(parameter) != scale_id]
    row = _Layer(name, kind, found, tuple(found.shape), stored, "dense", why_unscalable(layer) or unblocked)
    grid = getattr(layer, "grid", None)
    if isinstance(layer, ScaledLayer):
        row.alive = effective_scale(layer.scale.detach(), layer.mask, layer.form) != 0
        row.reason = why_unpacked(layer) or TRAINING
    elif isinstance(grid, BlockGrid):
        row.alive = grid.nonzero(found)
        row.reason = why_unpacked(layer) or row.reason
    row.grid = grid if row.alive is not None else None
    return row


def _kept_of_packed(layer: PackedConv) -> Tensor:
    rows, columns = layer.grid.shape
    counts = layer.crow_indices.diff().long()
    row = torch.repeat_interleave(torch.arange(rows, device=counts.device), counts)
    kept = torch.zeros((rows, columns), dtype=torch.bool, device=counts.device)
    kept[row, layer.col_indices.long()] = True
    return kept


def _of_function(seen: Seen, name: str, parameters: dict[int, str], reason: str) -> _Layer:
    call = seen.calls[0]
    arguments = dict(zip(FUNCTIONS[seen.layer][1], call.args, strict=False)) | call.kwargs
    weight, bias = arguments["weight"], arguments.get("bias")
    stored = [t for t in (weight, bias) if isinstance(t, nn.Parameter)]
    kind = FUNCTIONS[seen.layer][0].__name__.lower().replace("transpose", "_transpose")
    name = parameters.get(id(weight), name)
    return _Layer(name, kind, weight, tuple(weight.shape), stored, "dense", reason)


def _row(layer: _Layer, owners: dict[int, str]) -> LayerRow:
    """The row of `layer`; tensors that are in `owners` belong to an earlier row and are not counted again."""
    shared = owners.get(id(layer.weight)) if layer.weight is not None else None
    own = [tensor for tensor in layer.stored if id(tensor) not in owners]
    owners.update((id(tensor), layer.name) for tensor in own)
    run = sum(call.macs for call in layer.calls)
    dense = kept = run
    params_dense = params = sum(tensor.numel() for tensor in own)
    total = alive = 0
    sparsity = 0.0
    if layer.grid is not None and layer.alive is not None:
        numel = layer.grid.numel()
        left = int(numel[layer.alive.cpu()].sum())
        positions = sum(_positions(call, layer.grid) for call in layer.calls)
        dense, kept = positions * prod(layer.weight_shape), positions * left
        sparsity = 1 - int(layer.alive.sum()) / layer.alive.numel()
        if layer.weight is None:
            params_dense = prod(layer.weight_shape) + _bias_numel(layer)
            params = left + _bias_numel(layer)
        elif shared is None:
            params = params_dense - prod(layer.weight_shape) + left
        if shared is None:
            total, alive = layer.alive.numel(), int(layer.alive.sum())
    return LayerRow(
        layer.name,
        layer.kind,
        layer.weight_shape,
        layer.calls[0].output_shape,
        None if layer.grid is None else layer.grid.block_size,
        total,
        alive,
        sparsity,
        dense,
        kept,
        run,
        params_dense,
        params,
        sum(tensor.numel() * tensor.element_size() for tensor in own),
        layer.kernel,
        layer.reason if shared is None else f"{layer.reason}; shares the weight of {shared}",
    )


def _bias_numel(layer: _Layer) -> int:
    """Numel of a packed layer's bias, its fourth stored tensor."""
    return sum(tensor.numel() for tensor in layer.stored[3:])


def _positions(call: Call, grid: BlockGrid) -> int:
    """How often a call multiplies each weight, batch included."""
    if grid.transposed:
        return prod(call.input_shape) // grid.in_channels
    return prod(call.output_shape) // grid.out_channels


def _other(
    model: nn.Module, observed: Observation, rows: Iterable[LayerRow], owners: dict[int, str]
) -> LayerRow:
    """Everything that no row owns: the other MACs and parameters, but for scales."""
    blocked = any(isinstance(module, Blocked) for module in model.modules())
    scales = {id(layer.scale) for layer in blocked_layers(model)} if blocked else set()
    rest = [p for p in model.parameters() if id(p) not in owners and id(p) not in scales]
    macs = observed.macs - sum(row.macs_run for row in rows)
    numel = sum(parameter.numel() for parameter in rest)
    size = sum(parameter.numel() * parameter.element_size() for parameter in rest)
    called = {id(seen.layer) for seen in observed.modules}
    idle = [name for name, module in model.named_modules() if is_layer(module) and id(module) not in called]
    reason = "attention products and projections, norms, embeddings"
    if idle:
        reason += f"; not called as layers in eval mode: {', '.join(idle)}"
    return LayerRow(
        "other",
        "other",
        macs_dense=macs,
        macs=macs,
        macs_run=macs,
        params_dense=numel,
        params=numel,
        bytes=size,
        reason=reason,
    )
