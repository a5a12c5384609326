"""`prepare` and `convert`: what the user calls before training and for deployment."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import fx, nn

from fxdbsr.blocks import BlockGrid
from fxdbsr.calls import FUNCTIONS, why_unscalable_call
from fxdbsr.config import BlockConfig, as_block_size, as_form
from fxdbsr.graph import (
    TracedModule,
    TwoGraphModule,
    called_module,
    graph_modules,
    share_hooks,
    trace,
    trace_eval,
    unchanged_on_error,
    unwrap,
)
from fxdbsr.kernels.choice import as_backend, check_available
from fxdbsr.nn.scaled import Blocked, plain_type, why_unscalable
from fxdbsr.passes import CONVERT, PREPARE, TO_DENSE, run
from fxdbsr.passes.lowering import Lowering
from fxdbsr.passes.scale_functions import grid_of_call
from fxdbsr.passes.scale_layers import grid_of_layer
from fxdbsr.passes.selection import CONV_TYPES, Selection


def prepare(
    model: nn.Module,
    block_size: Any = (32, 32),
    *,
    config: BlockConfig | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    types: Sequence[type[nn.Module]] | None = None,
    form: str = "product",
    inplace: bool = False,
    concrete_args: dict[str, Any] | None = None,
) -> nn.Module:
    """Give every conv of `model` trainable block scales; its outputs stay the same, bit for bit.

    Each blocked conv gets a parameter `<conv>.scale` of ones and a boolean buffer `<conv>.mask` over the grid
    of blocks of its weight (`fxdbsr.blocks`); every other parameter and buffer keeps its name and value.

    Args:
        model: any module that `torch.fx` can trace; wrappers of torch.compile and DistributedDataParallel are
            taken off.
        block_size: (out, in) channels of a block, or one int for both; None stands for the whole axis:
            (1, None) is filter sparsity, (None, 1) channel sparsity.
        config: block sizes by layer; takes the place of `block_size` and `form`.
        filter_fn: `filter_fn(module, name) -> bool` picks layers.
        types: classes of layers to block; the conv classes by default, `nn.Linear` on request.
        form: "product"; "clamp" for scales clamped to [0, 1] with a straight-through gradient, as the method's
            authors have it; "mask" for scales that stay one: then only masks remove blocks.
        inplace: change `model` instead of a copy of it.
        concrete_args: as in `torch.fx.symbolic_trace`.

    Returns:
        A `torch.fx.GraphModule`, or a module that holds two where training and evaluation run different
        graphs. It is in the mode that `model` is in.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, a model that cannot be traced, an unknown layer
            name in `config`, integer or complex weights, no layer to block. `model` is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    model = unwrap(model)
    if any(isinstance(module, Blocked) for module in model.modules()):
        raise ValueError("model: expected a model without block scales, got one that is prepared already")
    if config is None:
        config = BlockConfig(as_block_size(block_size), form=as_form(form))
    elif not isinstance(config, BlockConfig):
        raise TypeError(f"config: expected a BlockConfig, got {type(config).__name__}")
    if concrete_args is not None and not isinstance(concrete_args, dict):
        raise TypeError(f"concrete_args: expected a dict of the forward's arguments, got {concrete_args!r}")
    selection = Selection(config, filter_fn, CONV_TYPES if types is None else types)
    with unchanged_on_error(model) if inplace else nullcontext():
        return _prepared(model if inplace else _copied(model), selection, concrete_args)


def _prepared(
    model: nn.Module,
    selection: Selection,
    concrete_args: dict[str, Any] | None,
    tracer: Callable[..., TracedModule | TwoGraphModule] = trace,
) -> TracedModule | TwoGraphModule:
    traced = tracer(model, concrete_args)
    _check_names(traced, selection.config)
    parts = [graph_module for _, graph_module in graph_modules(traced)]
    for part in parts:
        _check_weights(part, selection)
    for part in parts:
        run(PREPARE, part, selection)
    if not any(isinstance(module, Blocked) for module in traced.modules()):
        raise ValueError(f"{type(model).__name__} has no layer to block: {_why_nothing(traced, selection)}")
    return traced


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be copied: {error}; pass inplace=True") from error


def _check_names(model: nn.Module, config: BlockConfig) -> None:
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for name in config.by_name:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"by_name: the model has no layer {name!r}{hint}")


def _check_weights(model: fx.GraphModule, selection: Selection) -> None:
    for node in model.graph.nodes:
        layer = called_module(node)
        if layer is not None:
            grid_of_layer(layer, str(node.target), selection)
        grid_of_call(node, selection)


def _why_nothing(model: TracedModule | TwoGraphModule, selection: Selection) -> str:
    reasons = [
        f"{name}: {why_unscalable(module)}"
        for name, module in model.named_modules()
        if plain_type(type(module)) is not None and why_unscalable(module)
    ]
    for _, graph_module in graph_modules(model):
        for node in graph_module.graph.nodes:
            if node.op == "call_function" and node.target in FUNCTIONS and why_unscalable_call(node):
                reasons.append(f"{node.name}: {why_unscalable_call(node)}")
    return "; ".join(reasons[:5]) or "none of the types, names and filters given selects one"


def convert(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    backend: str = "auto",
    block_size: Any = None,
    tune: bool = False,
    inplace: bool = False,
) -> fx.GraphModule:
    """Lower `model` for inference: scales and batch norms folded, zero blocks dropped, epilogues fused.

    Only blocks that are exactly zero go, so the outputs equal those of `model.eval()` within floating-point
    error for finite inputs; NaN and infinity do not pass through blocks that were dropped.

    Args:
        model: prepared by `prepare`, as a whole or in parts, or an ordinary model whose weights hold blocks
            of zeros.
        example_inputs: a tensor or a tuple of the model's arguments, for `tune`.
        backend: "auto" takes for each layer the engine that a rule on shape and density expects to be fastest;
            "triton", "cpu" and "reference" pack every layer that they can and raise where they cannot run;
            "dense" calls torch's convs.
        block_size: required for an ordinary model; for a prepared one None or its own.
        tune: measure the engines of each layer instead of following the rule; needs `example_inputs`.
        inplace: change `model` instead of a copy of it.

    Returns:
        A `torch.fx.GraphModule` in eval mode. Each blocked conv holds `values [nnz, BO, BC, *kernel]`,
        `crow_indices`, `col_indices` and `bias`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, a model that cannot be traced, NaN or infinity in
            weights, scales or batch norms (the layer is named). `model` is then unchanged.
        RuntimeError: the backend that was asked for by name cannot run here.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if tune and example_inputs is None:
        raise ValueError("tune: measuring needs example_inputs, got None")
    if tune and backend != "auto":
        raise ValueError(f"tune: measuring chooses the engine, so it goes with backend='auto', got {backend!r}")
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    lowering = Lowering(as_backend(backend), tune, inputs)
    model = unwrap(model)
    is_prepared = any(isinstance(module, Blocked) for module in model.modules())
    if not is_prepared and block_size is None:
        raise ValueError("block_size: required for a model that is not prepared, got None")
    if is_prepared:
        check_block_size(model, block_size)
    with unchanged_on_error(model) if inplace else nullcontext():
        source = model if inplace else _copied(model)
        if not is_prepared:
            source = _prepared(source, Selection(BlockConfig(as_block_size(block_size))), None, trace_eval)
        weight = next(p for p in source.parameters() if p.is_floating_point())
        check_available(backend, weight.dtype, weight.device)
        source.eval()
        traced = source.graph_module(False) if isinstance(source, TwoGraphModule) else source
        if not isinstance(traced, fx.GraphModule):  # only parts of it were prepared
            traced = trace_eval(source)
        run(CONVERT, traced, lowering)
        converted = fx.GraphModule(traced, traced.graph, type(traced).__name__).eval()
        share_hooks(source, converted)
        return converted


def to_dense(model: nn.Module) -> fx.GraphModule:
    """The ordinary dense model behind a prepared or converted one: layers of `torch.nn`, zeros in their weights.

    Args:
        model: prepared, or converted; stays as it is.

    Returns:
        A `torch.fx.GraphModule` in eval mode that computes the same.

    Raises:
        TypeError, ValueError: `model` is neither, or holds NaN or infinity (the layer is named).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    source = _copied(unwrap(model)).eval()
    traced = source.graph_module(False) if isinstance(source, TwoGraphModule) else source
    if not isinstance(traced, fx.GraphModule):
        raise ValueError(f"model: expected a prepared or converted model, got {type(model).__name__}")
    run(TO_DENSE, traced, Lowering("dense"))
    return fx.GraphModule(traced, traced.graph, type(traced).__name__).eval()


def check_block_size(model: nn.Module, block_size: Any) -> None:
    """Refuse a `block_size` other than the one that `model` was prepared with.

    Raises:
        ValueError: they differ; the message names the first layer that differs.
    """
    if block_size is None:
        return
    wanted = as_block_size(block_size)
    for name, module in model.named_modules():
        if isinstance(module, Blocked):
            grid = module.grid
            other = BlockGrid.of(grid.weight_shape, wanted, grid.groups, grid.transposed)
            if other != grid:
                raise ValueError(f"block_size: {name} was prepared with blocks of {grid.block_size}, got {block_size}")
