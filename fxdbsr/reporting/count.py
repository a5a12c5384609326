"""From what a forward did to rows: blocks, MACs, parameters and bytes of every layer, and of the rest.

The MACs of a dense layer, and `macs_run` of every layer, are half of what `FlopCounterMode` counted in it;
those of a blocked layer's dense form and of its kept blocks are `positions * numel`, where positions say how
often the forward multiplies each weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from fxdbsr.blocks import BlockGrid
from fxdbsr.layers import blocked_layers
from fxdbsr.nn.packed import PackedConv
from fxdbsr.nn.scaled import Blocked
from fxdbsr.reporting.observe import Call, Observation, is_layer
from fxdbsr.reporting.rows import LayerRow
from fxdbsr.reporting.weights import Weight, weight_of_function, weight_of_module


@dataclass
class Tally:
    """The rows of one model.

    Attributes:
        rows: in the order of the first calls.
        other: the row of everything else.
        masks: `[rows, columns]` bool, False where a block is zero, by the name of the row.
        of_module: the row of each module that was called, by the module's id.
        of_function: the row of each functional call, in order.
        calls: what each row was made from.
    """

    rows: list[LayerRow]
    other: LayerRow
    masks: dict[str, Tensor]
    of_module: dict[int, int]
    of_function: list[int]
    calls: list[list[Call]]


def tally(model: nn.Module, observed: Observation, function_reasons: list[tuple[str, str]]) -> Tally:
    """Rows for what was `observed` of `model`.

    Args:
        function_reasons: for each functional call, its name in the graph and why it has no block scales.
    """
    names = {id(module): uncompiled(name) for name, module in model.named_modules()}
    parameters = {id(parameter): uncompiled(name) for name, parameter in model.named_parameters()}
    has_blocks = any(isinstance(m, Blocked | PackedConv) for m in model.modules())
    unblocked = "not selected" if has_blocks else "not prepared"
    layers: dict[str, Weight] = {}
    places: dict[str, int] = {}

    def add(layer: Weight, key: str, calls: list[Call]) -> int:
        layers.setdefault(key, layer).calls.extend(calls)
        return places.setdefault(key, len(places))

    of_module, of_function = {}, []
    for calls in observed.modules:
        layer = weight_of_module(calls[0], names[id(calls[0].layer)], parameters, unblocked)
        of_module[id(calls[0].layer)] = add(layer, layer.name, calls)
    for call, (name, reason) in zip(observed.functions, function_reasons, strict=True):
        layer = weight_of_function(call, name, parameters, reason or unblocked)
        of_function.append(add(layer, f"{layer.name}()", [call]))
    for name, found in layers.items():
        if found.alive is not None and found.alive.is_meta:
            raise ValueError(f"{name}: which blocks are zero is not known of a model on the meta device")
    owners: dict[int, str] = {}
    rows = [_row(layer, owners) for layer in layers.values()]
    masks = {layer.name: layer.alive.cpu() for layer in layers.values() if layer.alive is not None}
    other = _other(model, observed, rows, owners)
    return Tally(rows, other, masks, of_module, of_function, [layer.calls for layer in layers.values()])


def uncompiled(name: str) -> str:
    """`name` without the part that torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _row(layer: Weight, owners: dict[int, str]) -> LayerRow:
    """The row of `layer`; tensors that are in `owners` belong to an earlier row and are not counted again."""
    shared = owners.get(id(layer.dense)) if layer.dense is not None else None
    own = [tensor for tensor in layer.stored if id(tensor) not in owners]
    owners.update((id(tensor), layer.name) for tensor in own)
    run = sum(call.macs for call in layer.calls)
    dense = kept = run
    params_dense = params = sum(tensor.numel() for tensor in own)
    total = alive = 0
    sparsity = 0.0
    if layer.dense is not None and layer.dense_grid is not None:
        before = layer.dense_grid
        dense = run * prod(layer.weight_shape) // layer.dense.numel()
        params_dense = prod(layer.weight_shape) + (before.out_channels if _bias_numel(layer) else 0)
    if layer.grid is not None and layer.alive is not None:
        before = layer.dense_grid or layer.grid
        numel = layer.grid.numel()
        left = int(numel[layer.alive.cpu()].sum())
        positions = sum(_positions(call, layer.grid) for call in layer.calls)
        dense, kept = positions * prod(layer.weight_shape), positions * left
        sparsity = 1 - int(layer.alive.sum()) / prod(before.shape) if layer.blocked else 0.0
        if layer.dense is None:
            params_dense = prod(layer.weight_shape) + (before.out_channels if _bias_numel(layer) else 0)
            params = left + _bias_numel(layer)
        elif shared is None:
            params -= prod(layer.grid.weight_shape) - left
        if shared is None and layer.blocked:
            total, alive = prod(before.shape), int(layer.alive.sum())
    return LayerRow(
        layer.name,
        layer.kind,
        layer.weight_shape,
        layer.calls[0].output_shape,
        layer.grid.block_size if layer.grid is not None and layer.blocked else None,
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


def _bias_numel(layer: Weight) -> int:
    """Numel of the bias: what is stored after the weight, or after the three tensors of a packed one."""
    return sum(tensor.numel() for tensor in layer.stored[3 if layer.dense is None else 1 :])


def _positions(call: Call, grid: BlockGrid) -> int:
    """How often a call multiplies each weight, batch included."""
    if grid.transposed:
        return prod(call.input_shape) // grid.in_channels
    return prod(call.output_shape) // grid.out_channels


def _other(model: nn.Module, observed: Observation, rows: Iterable[LayerRow], owners: dict[int, str]) -> LayerRow:
    """Everything that no row owns: the other MACs and parameters, but for scales."""
    blocked = any(isinstance(module, Blocked) for module in model.modules())
    scales = {id(layer.scale) for layer in blocked_layers(model)} if blocked else set()
    rest = [p for p in model.parameters() if id(p) not in owners and id(p) not in scales]
    macs = observed.macs - sum(row.macs_run for row in rows)
    numel = sum(parameter.numel() for parameter in rest)
    size = sum(parameter.numel() * parameter.element_size() for parameter in rest)
    called = {id(calls[0].layer) for calls in observed.modules}
    idle = [uncompiled(name) for name, module in model.named_modules() if is_layer(module) and id(module) not in called]
    reason = "attention products and projections, norms, embeddings"
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        reason += ", scripted modules with their layers"
    if idle:
        more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
        reason += f"; not called as layers in eval mode: {', '.join(idle[:3])}{more}"
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
