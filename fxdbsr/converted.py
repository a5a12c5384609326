"""The converted model: a graph module that carries its own description, so that its tensors can be loaded again.

`state_dict` holds plain tensors: the packed blocks, what other layers keep, and under `_extra_state` the record
of graph and layers (`fxdbsr.record`) as JSON in bytes, which is how it survives files that hold tensors alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import PythonCode

from fxdbsr.blocks import BlockGrid
from fxdbsr.channels.layers import CHANNELWISE
from fxdbsr.graph import called_module
from fxdbsr.network.runner import Runner
from fxdbsr.nn.changes import one_warning
from fxdbsr.nn.packed import PackedConv
from fxdbsr.nn.scaled import SCALED
from fxdbsr.record import FORMAT, graph_record
from fxdbsr.traced import GraphModule, TracedModule

STATE = "_extra_state"  # torch's name for it
_PACKED = (
    *("activation", "negative_slope", "backend", "blocked", "stride", "padding", "dilation", "pad"),
    *("output_padding", "adds_residual", "input_size", "precision", "pool"),
)


class ConvertedModule(TracedModule):
    """What `fxdbsr.convert` returns, in eval mode.

    On a CPU a call is one run of compiled steps; on a GPU convs take in the pools behind them (`fxdbsr.network`).
    """

    def recompile(self) -> PythonCode:
        """As torch.fx; the generated forward runs where the steps do not."""
        code = super().recompile()
        kind: Any = type(self)  # torch.fx makes a class for each instance, and no copy or file holds it
        kind.forward, kind.runner = forward_of(kind.forward), None
        return code

    @classmethod
    def of(cls, model: fx.GraphModule) -> ConvertedModule:
        """The converted module over what the graph of `model` reads."""
        name = type(model).__name__
        return cls(GraphModule(model, model.graph, name), model.graph, name).eval().requires_grad_(False)

    def get_extra_state(self) -> Tensor:
        """The record as JSON in a uint8 tensor."""
        return torch.frombuffer(bytearray(json.dumps(describe(self)).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: the graph is there already. `fxdbsr.load` makes one from the record."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with one_warning():
            return super()._apply(fn, recurse)  # type: ignore[no-any-return]


def forward_of(graph_forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that takes the steps, or convs that pool, where they can serve, else `graph_forward`."""

    @wraps(graph_forward)
    def forward(self: ConvertedModule, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and not torch.compiler.is_compiling():
            kind: Any = type(self)
            if kind.runner is None or not kind.runner.is_current():
                kind.runner = Runner(self)
            if kind.runner.may_run(args, self):
                ran, output = kind.runner.run(self, args)
                if ran:
                    return output
            elif kind.runner.may_pool(args, self):
                return kind.runner.pooled(self, *args)
        return graph_forward(self, *args, **kwargs)

    return forward


def read_record(state: Tensor) -> dict[str, Any]:
    """The record in `state`.

    Raises:
        ValueError: it is damaged, of another format, or says why the model cannot be described.
    """
    try:
        record = json.loads(bytes(state.tolist()))
        version, reason = record["format"], record.get("why_not")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{STATE}: damaged record: {error!r}") from error
    if version != FORMAT:
        raise ValueError(f"{STATE}: expected a record of format {FORMAT}, got {version!r}: another version of fxdbsr")
    if reason is not None:
        raise ValueError(f"{STATE}: the model could not be described when it was saved: {reason}")
    assert isinstance(record, dict)
    return record


def describe(model: fx.GraphModule) -> dict[str, Any]:
    """The record of `model`, or a record that says why there is none."""
    layers = {str(node.target): m for node in model.graph.nodes if (m := called_module(node)) is not None}
    try:
        return {
            "format": FORMAT,
            "class": type(model).__name__,
            "graph": graph_record(model.graph),
            "layers": {name: about for name, layer in layers.items() if (about := describe_layer(layer, name))},
        }
    except ValueError as error:
        return {"format": FORMAT, "why_not": str(error)}


def describe_layer(layer: nn.Module, name: str) -> dict[str, Any] | None:
    """What makes `layer` again but its tensors; None for one that is made again from what the model has in its place.

    Raises:
        ValueError: a layer of fxdbsr's that no record describes.
    """
    grids = {key: grid_record(getattr(layer, key)) for key in ("grid", "dense_grid") if hasattr(layer, key)}
    shared: dict[str, Any] = {"grids": grids, "kept_channels": getattr(layer, "kept_channels", "")}
    if isinstance(layer, PackedConv):
        own = {key: getattr(layer, key) for key in _PACKED}
        return {"kind": "PackedConv"} | own | shared
    if type(layer) in SCALED and layer._parameters.get("weight") is not None:  # else a hook computes it
        return {"kind": type(layer).__name__, "arguments": arguments(layer)} | shared
    if type(layer) in CHANNELWISE:
        return {"kind": type(layer).__name__, "arguments": norm_arguments(layer)}
    if type(layer).__module__.startswith("fxdbsr.") and not isinstance(layer, nn.MaxPool2d):
        raise ValueError(f"{name}: no record describes a {type(layer).__name__}")
    return None


def norm_arguments(layer: nn.Module) -> dict[str, Any]:
    """The arguments with which the class of `layer`, a norm or another of `CHANNELWISE`, makes its like."""
    names = ("num_groups", "num_channels", "num_features", "num_parameters", "eps", "affine", "track_running_stats")
    return {name: getattr(layer, name) for name in names if hasattr(layer, name)}


def arguments(layer: nn.Module) -> dict[str, Any]:
    """The arguments with which the class of `layer`, a conv or linear layer of torch's own, makes its like."""
    names = ["in_features", "out_features"]
    if not isinstance(layer, nn.Linear):
        names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"]
        names += ["padding_mode", *(["output_padding"] if layer.transposed else [])]
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}


def grid_record(grid: BlockGrid) -> list[Any]:
    """`grid` as the list of its fields."""
    return [
        grid.out_channels,
        grid.in_channels,
        list(grid.kernel_size),
        grid.groups,
        list(grid.block_size),
        grid.transposed,
    ]


def grid_from(record: list[Any]) -> BlockGrid:
    """The inverse of `grid_record`."""
    out, in_, kernel, groups, block, transposed = record
    return BlockGrid(out, in_, tuple(kernel), groups, tuple(block), transposed)
