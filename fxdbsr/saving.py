"""`save` and `load`: a converted model's tensors in a file, and the model again from the file and the dense model.

No code is loaded: the tensors are read as such (safetensors, or torch's `weights_only`), and the steps of the graph
are those of the model that is given (`fxdbsr.record`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxdbsr.baking import bake_pruning
from fxdbsr.converted import STATE, ConvertedModule, describe, read_record
from fxdbsr.copies import copied
from fxdbsr.files import as_path, writing
from fxdbsr.graph import called_module
from fxdbsr.nn.packed import PackedConv
from fxdbsr.nn.scaled import Blocked
from fxdbsr.passes.lowering import Lowering
from fxdbsr.passes.name_pools import name_pools
from fxdbsr.rebuild import rebuild
from fxdbsr.traced import share_hooks, trace_eval, unwrap

SAFETENSORS = ".safetensors"


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the state dict of a converted model, for `load`; what was at `path` is replaced once all is written.

    Args:
        model: as `convert` returns it.
        path: of a safetensors file where it ends in ".safetensors", else of one that `torch.save` writes.

    Raises:
        TypeError, ValueError: no module or no path; a module that is not converted, or was in parts, or that no file of
            tensors describes.
        ImportError: safetensors is not installed. OSError: the file cannot be written.
    """
    model = unwrap(model)
    if (reason := why_not_saved(model)) is not None:
        raise ValueError(f"model: {reason}")
    path = as_path(path)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    with writing(path) as unfinished:
        if path.suffix == SAFETENSORS:
            from safetensors.torch import save_file

            # it takes no tensors that share memory, and no order of axes but one
            whole = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
            save_file(whole, unfinished, {"format": "pt"})
        else:
            torch.save(state, unfinished)


def why_not_saved(model: nn.Module) -> str | None:
    """Why no file of tensors describes `model`, as a sentence, or None."""
    kind = type(model).__name__
    if isinstance(model, ConvertedModule):
        reason = describe(model).get("why_not")
        return None if reason is None else f"no file of tensors describes {kind}: {reason}"
    if any(isinstance(module, ConvertedModule | PackedConv) for module in model.modules()):
        return f"{kind} was converted in parts, which no file of tensors describes; torch.export.save and torch.save do"
    return f"expected a converted model, got {kind}: call fxdbsr.convert first"


def load(
    model: nn.Module, path: str | os.PathLike[str], *, concrete_args: dict[str, Any] | None = None
) -> ConvertedModule:
    """The converted model whose state dict is in the file at `path`.

    Engines are chosen anew for this machine. Reading the file runs no code.

    Args:
        model: the ordinary dense model, as it was before `prepare`; its weights do not matter and may be on the
            meta device. It stays as it is.
        path: written by `save`, or by `torch.save` or safetensors' `save_file` from `state_dict()` of a converted
            model.
        concrete_args: as given to `prepare`.

    Returns:
        The model in eval mode, with the file's dtypes, on the device of `model` (the CPU where that is meta).

    Raises:
        TypeError, ValueError: an argument of the wrong kind; a file that is damaged, holds no converted model, or
            one of another model (the message names the first tensor or step that does not fit).
        ImportError: safetensors is not installed. OSError: the file cannot be read.
    """
    model = unwrap(model)
    if concrete_args is not None and not isinstance(concrete_args, dict):
        raise TypeError(f"concrete_args: expected a dict of the forward's arguments, got {concrete_args!r}")
    if any(isinstance(module, Blocked | PackedConv) for module in model.modules()):
        raise ValueError("model: expected the dense model, got one that is prepared or converted")
    state = without_prefix(read(as_path(path)))
    if STATE not in state:
        raise ValueError(f"{path}: expected the state of a converted model, which holds {STATE}")
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    traced = trace_eval(copied(model, tensors), concrete_args)  # the copy shares the tensors
    written = fx.Graph()
    written.graph_copy(traced.graph, {})
    name_pools(traced, Lowering("auto"))  # as in the model that was saved; older ones call the functions
    try:
        converted = rebuild(traced, read_record(state.pop(STATE)), state, written)
        keep_hooks(traced, converted)
    except ValueError as error:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {error}") from error
    share_hooks(model, converted)
    return converted


def keep_hooks(traced: fx.GraphModule, converted: ConvertedModule) -> None:
    """Let the layers of `converted` run what is hooked to those of `traced`, but for pruning, which their weights hold.

    Raises:
        ValueError: a layer with hooks, which conversion leaves as it is, is packed or gone.
    """
    layers = dict(converted.named_modules())
    for node in traced.graph.nodes:
        layer, name = called_module(node), str(node.target)
        if layer is None or layers.get(name) is layer:
            continue
        bake_pruning(layer)
        if layer._forward_hooks or layer._forward_pre_hooks:
            if name not in layers or isinstance(layers[name], PackedConv):
                raise ValueError(f"{name}: the model has forward hooks here, the one that was saved had none")
            share_hooks(layer, layers[name])


def without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` without what wrappers (torch.compile, DataParallel) put before every name."""
    prefix = next((name.removesuffix(STATE) for name in state if name.endswith(STATE)), "")
    if not all(name.startswith(prefix) for name in state):
        return state
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def read(path: Path) -> dict[str, Tensor]:
    """The tensors by name in the file at `path`.

    Raises:
        ValueError: it holds anything else. ImportError: safetensors is not installed. OSError: it cannot be read.
    """
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"  # after the header's length
    try:
        if is_safetensors:
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: expected tensors saved by safetensors or torch.save: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a state dict of tensors, got {type(state).__name__}")
    return dict(state)
