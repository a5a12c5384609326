"""`prepare` and `convert`: what the user calls before training and for deployment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import fx, nn

from fxdbsr.baking import bake_weights
from fxdbsr.config import BlockConfig, as_block_size, as_form
from fxdbsr.converted import ConvertedModule
from fxdbsr.copies import copied
from fxdbsr.kernels.choice import as_backend, check_available
from fxdbsr.lowered import dense_module, lowered
from fxdbsr.nn.packed import PackedConv
from fxdbsr.nn.scaled import Blocked, ScaledLayer
from fxdbsr.passes import CONVERT, TO_DENSE
from fxdbsr.passes.lowering import Lowering
from fxdbsr.passes.selection import CONV_TYPES, Selection
from fxdbsr.prepared import check_block_size, prepared
from fxdbsr.traced import TwoGraphModule, trace_eval, unwrap
from fxdbsr.undo import unchanged_on_error


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
        model: any module; wrappers of torch.compile and DistributedDataParallel are taken off.
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
        graphs. Where torch.fx cannot trace the whole, the model itself, with graphs in the places of the largest
        submodules that it can trace; `untraced` says why for the rest, and the report prints it. The result is in
        the mode that `model` is in.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, a model that is prepared already, an unknown layer
            name in `config`, integer or complex weights, no layer to block; a model that cannot be traced with the
            `concrete_args` given. `model` is then unchanged.
    """
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
        return prepared(model if inplace else _copied(model), selection, concrete_args)


def convert(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    backend: str = "auto",
    block_size: Any = None,
    tune: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Lower `model` for inference: scales and batch norms folded, zero blocks dropped, epilogues fused.

    Only blocks that are exactly zero go, so the outputs equal those of `model.eval()` within floating-point
    error for finite inputs; NaN and infinity do not pass through blocks that were dropped.

    Args:
        model: prepared by `prepare`, as a whole or in parts, or an ordinary model whose weights hold blocks
            of zeros, also by `torch.nn.utils.prune`, `torch.ao.pruning` or a parametrization.
        example_inputs: a tensor or a tuple of the model's arguments: the sizes that the rule goes by, and what `tune`
            measures on.
        backend: "auto" takes for each layer the engine that a rule on shape and density expects to be fastest;
            "triton", "cpu" and "reference" pack every layer that they can and raise where they cannot run;
            "dense" calls torch's convs.
        block_size: required for an ordinary model; for a prepared one None or its own.
        tune: measure the engines of each layer instead of following the rule; needs `example_inputs`.
        inplace: change `model` instead of a copy of it.

    Returns:
        A `torch.fx.GraphModule` in eval mode; a module that holds such where torch.fx cannot trace the whole. Each
        blocked conv holds `values [nnz, BO, BC, *kernel]`, `crow_indices`, `col_indices` and `bias`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, a model without layers to block or converted already,
            NaN or infinity in weights, scales or batch norms, weights of blocked layers that a hook computes (the layer
            is named), or tensors on the meta device, which have no values. `model` is then unchanged.
        RuntimeError: the backend that was asked for by name cannot run here.
    """
    model = unwrap(model)
    if tune and example_inputs is None:
        raise ValueError("tune: measuring needs example_inputs, got None")
    if tune and backend != "auto":
        raise ValueError(f"tune: measuring chooses the engine, so it goes with backend='auto', got {backend!r}")
    inputs = example_inputs if isinstance(example_inputs, tuple | None) else (example_inputs,)
    lowering = Lowering(as_backend(backend), tune, inputs or ())
    check_has_values(model)
    is_prepared = any(isinstance(module, Blocked) for module in model.modules())
    if isinstance(model, ConvertedModule):
        raise ValueError("model: expected a prepared or an ordinary model, got one that is converted already")
    if not is_prepared and block_size is None:
        raise ValueError("block_size: required for a model that is not prepared, got None")
    if is_prepared:
        check_block_size(model, block_size)
    with unchanged_on_error(model) if inplace else nullcontext():
        source = (model if inplace else _copied(model)).eval()
        bake_blocked_weights(source)
        if not is_prepared:
            bake_weights(source.modules())
            source = prepared(source, Selection(BlockConfig(as_block_size(block_size))), None, trace_eval)
        weight = next(p for p in source.parameters() if p.is_floating_point())
        check_available(backend, weight.dtype, weight.device)
        return lowered(source.eval(), CONVERT, lowering, ConvertedModule.of)


def to_dense(model: nn.Module) -> nn.Module:
    """The ordinary dense model behind a prepared or converted one, without the channels that are dead.

    What is left are layers of `torch.nn`, zeros in their weights, which `torch.onnx.export` and any other tool
    takes. Batch norms that conversion folded stay folded.

    Args:
        model: prepared, or converted; stays as it is.

    Returns:
        A `torch.fx.GraphModule` in eval mode that computes the same and can be trained on; a module with such parts
        for a model that torch.fx cannot trace as a whole.

    Raises:
        TypeError, ValueError: `model` is neither, or holds NaN or infinity (the layer is named), or is on the meta
            device.
    """
    source = unwrap(model)
    if not any(
        isinstance(module, fx.GraphModule | TwoGraphModule | Blocked | PackedConv) for module in source.modules()
    ):
        raise ValueError(f"model: expected a prepared or converted model, got {type(source).__name__}")
    check_has_values(source)
    source = _copied(source).eval()
    bake_blocked_weights(source)
    return lowered(source, TO_DENSE, Lowering("dense"), dense_module)


def bake_blocked_weights(model: nn.Module) -> None:
    """`bake_weights` for the blocked layers of `model`, which somebody pruned or parametrized; others keep theirs."""
    bake_weights(module for module in model.modules() if isinstance(module, ScaledLayer))


def check_has_values(model: nn.Module) -> None:
    """Refuse a model of shapes alone.

    Raises:
        ValueError: a parameter or buffer is on the meta device; the message names the first.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{name}: expected a tensor that holds values, got one on the meta device")


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copied(model)
    except ValueError as error:
        raise ValueError(f"{error}; pass inplace=True") from error
