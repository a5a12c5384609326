"""A converted model from its record, its saved tensors, and the traced dense model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fxdbsr.blocks import BlockGrid
from fxdbsr.channels.layers import CHANNELWISE
from fxdbsr.converted import ConvertedModule, grid_from
from fxdbsr.kernels.choice import as_backend
from fxdbsr.kernels.geometry import ACTIVATIONS
from fxdbsr.nn.packed import PackedConv
from fxdbsr.nn.pool import pack
from fxdbsr.nn.scaled import SCALED
from fxdbsr.record import graph_from
from fxdbsr.traced import GraphModule, TracedModule

_KINDS = {kind.__name__: kind for kind in SCALED}
_NORMS: dict[str, Any] = {kind.__name__: kind for kind in CHANNELWISE}


def rebuild(
    traced: TracedModule, record: dict[str, Any], state: dict[str, Tensor], written: fx.Graph
) -> ConvertedModule:
    """The converted model that `record` describes.

    Args:
        traced: the dense model with the layers that conversion names.
        record, state: of the file; what is used of `state` is taken out.
        written: the graph of the dense model before, whose functions the record may call.

    Raises:
        ValueError: they do not fit each other; the message names the first tensor or step that does not.
    """
    try:
        return _rebuilt(traced, record, state, written)
    except (KeyError, TypeError, IndexError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"damaged record: {error!r}") from error


def _rebuilt(
    traced: TracedModule, record: dict[str, Any], state: dict[str, Tensor], written: fx.Graph
) -> ConvertedModule:
    device = next((t.device for t in traced.parameters() if not t.is_meta), torch.device("cpu"))
    state = {name: tensor.to(device) for name, tensor in state.items()}
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
    graph = graph_from(record.get("graph"), [written])
    graph.set_codegen(traced.graph._codegen)
    parts: dict[str, Any] = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "call_module" and name not in parts:
            own = {key[len(name) + 1 :]: state.pop(key) for key in list(state) if key.startswith(f"{name}.")}
            parts[name] = layer_from(record["layers"].get(name), own, name, traced, dtype)
        elif node.op == "get_attr" and name not in parts:
            parts[name] = tensor_from(state, name, traced, dtype)
    for name in record["layers"]:
        if name not in parts:
            raise ValueError(f"{name}: no step of the graph calls this layer")
    if state:
        raise ValueError(f"{next(iter(state))}: the file holds it, and no step of its graph reads it")
    return ConvertedModule.of(GraphModule(parts, graph, str(record["class"])))


def layer_from(
    about: dict[str, Any] | None, own: dict[str, Tensor], name: str, traced: TracedModule, dtype: torch.dtype
) -> nn.Module:
    """The layer `name`, which the record is `about`, with the tensors `own`."""
    if about is not None:
        check_weight(about, name, traced)
    if about is not None and about["kind"] == "PackedConv":
        return packed_from(about, own, name)
    if about is not None and about["kind"] in _KINDS:
        return dense_from(about, own, name)
    if about is not None:
        return norm_from(about, own, name)
    try:
        module = traced.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{name}: the model has no such layer") from error
    try:
        module.load_state_dict(own, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{name}: {error}") from error
    for part in module.modules():
        for key in part._non_persistent_buffers_set:
            if (buffer := part._buffers[key]) is not None:
                part._buffers[key] = _as(buffer, dtype)
    pack(module)
    return module


def check_weight(about: dict[str, Any], name: str, traced: TracedModule) -> None:
    """Refuse a blocked layer where the model has a weight of that name and of another shape."""
    grids = about.get("grids", {})
    if not grids:
        return
    owner, _, leaf = name.rpartition(".")
    holder: Any = traced.get_submodule(owner)
    weight = getattr(getattr(holder, leaf, None), "weight", getattr(holder, leaf.removesuffix("_conv"), None))
    expected = grid_from(grids.get("dense_grid", grids.get("grid"))).weight_shape
    if isinstance(weight, Tensor) and tuple(weight.shape) != expected:
        raise ValueError(f"{name}: the file has a weight {expected}, the model one of {tuple(weight.shape)}")


def packed_from(about: dict[str, Any], own: dict[str, Tensor], name: str) -> nn.Module:
    """The packed conv that the record is `about`."""
    grid = grid_from(about["grids"]["grid"])
    geometry = (about["stride"], about["padding"], about["dilation"])
    check_geometry(grid, *geometry, about["activation"])
    blocks = own.get("values", torch.empty(0)).shape[:1]
    shapes = {
        "values": (*blocks, *grid.block_size, *grid.kernel_size),
        "crow_indices": (grid.shape[0] + 1,),
        "col_indices": tuple(blocks),
    }
    check(own, shapes | ({"bias": (grid.out_channels,)} if "bias" in own else {}), name)
    packed = (own["values"], own["crow_indices"], own["col_indices"])
    grid.check_indices(*packed[1:], f"{name}.")
    pad = None if about["pad"] is None else (tuple(about["pad"][0]), about["pad"][1])
    backend, blocked = as_backend(about["backend"]), bool(about["blocked"])
    layer = PackedConv(packed, own.get("bias"), grid, *geometry, pad, backend, blocked, about["output_padding"])
    layer.activation, layer.negative_slope = about["activation"], float(about["negative_slope"])
    layer.adds_residual = bool(about["adds_residual"])
    layer.pool = 2 if about.get("pool") == 2 else 1
    layer.precision = "3xtf32" if about["precision"] == "3xtf32" else None
    layer.input_size = as_input_size(about["input_size"])
    layer.choose_engine()
    return marked(layer, about)


def as_input_size(size: Any) -> tuple[int, ...] | None:
    """`size` from a record: images, height, width."""
    return None if size is None else tuple(int(number) for number in size)


def marked(layer: nn.Module, about: dict[str, Any]) -> nn.Module:
    """`layer` in eval mode, with what the report reads."""
    for key, grid in about.get("grids", {}).items():
        if key not in ("grid", "dense_grid"):
            raise ValueError(f"damaged record: {key!r} is no grid")
        setattr(layer, key, grid_from(grid))
    if "kept_channels" in about:
        layer.kept_channels = str(about["kept_channels"])  # type: ignore[assignment]
    return layer.eval()


def check_geometry(grid: BlockGrid, stride: Any, padding: Any, dilation: Any, activation: Any) -> None:
    """Refuse a geometry that no conversion makes, before it reaches an engine."""
    if grid != BlockGrid.of(grid.weight_shape, grid.block_size, grid.groups, grid.transposed):
        raise ValueError(f"damaged record: {grid} is no grid of blocks")
    for numbers, least in ((stride, 1), (padding, 0), (dilation, 1)):
        if len(numbers) != len(grid.kernel_size) or not all(isinstance(n, int) and n >= least for n in numbers):
            raise ValueError(f"damaged record: {numbers} are no stride, padding or dilation of {grid}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"damaged record: {activation!r} is none of {ACTIVATIONS}")


def dense_from(about: dict[str, Any], own: dict[str, Tensor], name: str) -> nn.Module:
    """The conv, linear layer or batch norm of torch's own that the record is `about`."""
    arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in about["arguments"].items()}
    layer = _KINDS[about["kind"]](**arguments, device="meta")
    check(own, {key: tuple(tensor.shape) for key, tensor in layer.state_dict().items()}, name)
    layer.load_state_dict(own, assign=True)
    return marked(layer, about)


def norm_from(about: dict[str, Any], own: dict[str, Tensor], name: str) -> nn.Module:
    """The norm, or other module with a number for each channel, that the record is `about`."""
    norm = _NORMS[about["kind"]](**about["arguments"], device="meta")
    check(own, {key: tuple(t.shape) for key, t in norm.state_dict().items()}, name)
    for key, tensor in own.items():
        is_parameter = key in norm._parameters
        setattr(norm, key, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
    evaluated: nn.Module = norm.eval()
    return evaluated


def tensor_from(state: dict[str, Tensor], name: str, traced: TracedModule, dtype: torch.dtype) -> Tensor:
    """The tensor that the graph reads as `name`: saved, or one that the model makes itself and never saves."""
    if name in state:
        return state.pop(name)
    owner, _, leaf = name.rpartition(".")
    try:
        found = traced.get_submodule(owner)._buffers.get(leaf)
    except AttributeError:
        found = None
    if found is None or found.is_meta:
        raise ValueError(f"{name}: the file does not hold it")
    return _as(found, dtype)


def check(own: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], name: str) -> None:
    """Refuse tensors of the layer `name` that are missing, too many, or of another shape."""
    for key in (*shapes, *own):
        found = tuple(own[key].shape) if key in own else "nothing"
        if found != shapes.get(key, "nothing"):
            raise ValueError(f"{name}.{key}: expected {shapes.get(key, 'nothing')}, the file holds {found}")


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
