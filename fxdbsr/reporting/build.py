"""`report`: what a model costs, layer by layer, dense and with its zero blocks left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxdbsr.reporting.count import tally
from fxdbsr.reporting.graph import eval_graph, figures_graph, function_calls
from fxdbsr.reporting.observe import observe
from fxdbsr.reporting.result import Report
from fxdbsr.reporting.rows import sum_rows
from fxdbsr.reporting.timing import with_times
from fxdbsr.traced import unwrap


def report(model: nn.Module, example_inputs: Any, *, measure: bool = False) -> Report:
    """Count blocks, MACs, parameters and bytes of every conv and linear layer of `model`.

    The model runs once on `example_inputs`, in eval mode and without gradients; figures are for these inputs
    as given, batch included. Its mode, hooks and state are the same afterwards.

    Args:
        model: plain, prepared or converted; wrappers of torch.compile and DistributedDataParallel are looked
            through.
        example_inputs: a tensor, or a tuple of the model's arguments.
        measure: also time every layer and its dense form, in milliseconds; runs each about a dozen times.

    Raises:
        TypeError: `model` is no module, or `example_inputs` holds no tensor.
        ValueError: the forward fails on these inputs, parameters are not initialised yet, no values to `measure`
            with, blocks on the meta device, or the model has neither parameters nor MACs.
    """
    root = unwrap(model)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    shown = [_described(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if not shown:
        raise TypeError(f"example_inputs: expected a tensor or a tuple with one, got {example_inputs!r:.80}")
    if measure and any(leaf.is_meta for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)):
        raise ValueError("measure: expected inputs that hold values, got tensors on the meta device")
    for name, parameter in root.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} is not initialised yet: call the model once before its report")
    try:
        observed = observe(root, inputs, keep_inputs=measure)
    except Exception as error:
        raise ValueError(
            f"example_inputs: the forward of {type(root).__name__} fails on {', '.join(shown)}"
            f"{_home(root)}: {type(error).__name__}: {error}"
        ) from error
    graph_module = eval_graph(root)
    counted = tally(root, observed, function_calls(graph_module, len(observed.functions)))
    if not counted.rows and not counted.other.macs and not counted.other.params:
        raise ValueError(f"{type(root).__name__} has neither parameters nor MACs: nothing to report")
    if measure:
        counted.rows = with_times(root, counted)
    total = sum_rows([*counted.rows, counted.other], "total", "total")
    graph = figures_graph(root, graph_module, counted)
    name = type(graph_module or root).__name__
    return Report(name, tuple(shown), counted.rows, counted.other, total, graph, counted.masks, _untraced(root))


def _untraced(model: nn.Module) -> dict[str, str]:
    """What `prepare` noted of the parts of `model` that torch.fx cannot trace."""
    return dict(getattr(model, "untraced", {}))


def _described(tensor: Tensor) -> str:
    shape = "x".join(str(n) for n in tensor.shape) or "scalar"
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _home(model: nn.Module) -> str:
    """Where the model is, for a message."""
    first = next(model.parameters(), None)
    return "" if first is None else f" (its parameters are {_kind(first.dtype)} on {first.device})"


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
