"""Where commands get their models from: names, checkpoints, and the options that prepare and prune them."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from fxdbsr.api import prepare
from fxdbsr.config import BlockSize
from fxdbsr.models import resnet20, vgg11_cifar
from fxdbsr.ranking import block_prune_

OWN: dict[str, Callable[[], nn.Module]] = {"resnet20": resnet20, "vgg11-cifar": vgg11_cifar}
NESTED = ("model", "state_dict", "model_state_dict")  # keys under which training scripts keep the state dict
WRAPPERS = ("module.", "_orig_mod.")


def add_source(parser: argparse.ArgumentParser) -> None:
    """Declare MODEL and the options that say which weights and blocks it has."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="torchvision name, resnet20, vgg11-cifar, or package.module:callable")
    add("--checkpoint", type=Path, metavar="FILE", help="state dict of the plain or the prepared model")
    add("--shape", metavar="NxCxHxW", help="of the input (default: 1x3x224x224, or what the model is made for)")
    add("--block", metavar="OUTxIN", help="size of the blocks (default: 32x32); 'all' is the whole axis: 1xall")
    add("--sparsity", type=float, metavar="S", help="prune this fraction of every layer's blocks first (0 to 1)")
    add("--score", choices=("l2", "random"), default="l2", help="blocks to prune (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and of random pruning (default: %(default)s)")


def load_source(args: argparse.Namespace, prepared: bool = False) -> tuple[nn.Module, tuple[int, ...]]:
    """The model that `args` of `add_source` name, and the shape of its input.

    Args:
        prepared: prepare it in any case, not only where a block size, a sparsity or the checkpoint ask for it.

    Raises:
        ValueError, TypeError, OSError: an option is wrong, or the checkpoint does not fit.
    """
    shape = default_shape(args.model) if args.shape is None else parse_shape(args.shape)
    block = None if args.block is None else parse_block(args.block)
    if args.sparsity is not None and not 0 <= args.sparsity <= 1:
        raise ValueError(f"--sparsity: expected a fraction from 0 to 1, got {args.sparsity}")
    state = None if args.checkpoint is None else read_checkpoint(args.checkpoint)
    torch.manual_seed(args.seed)
    model = load_model(args.model)
    scaled = state is not None and has_scales(state)
    if scaled and block is None:
        raise ValueError(f"--block: {args.checkpoint} holds block scales, so say the blocks of its model, like 32x32")
    if state is not None and not scaled:
        load_state(model, state, args.checkpoint)
    if prepared or scaled or block is not None or args.sparsity is not None:
        model = prepare(model, (32, 32) if block is None else block)
    if state is not None and scaled:
        load_state(model, state, args.checkpoint)
    if args.sparsity is not None:
        generator = torch.Generator().manual_seed(args.seed)
        block_prune_(model, args.sparsity, score=args.score, generator=generator)
    return model, shape


def parse_shape(text: str) -> tuple[int, ...]:
    """(1, 3, 224, 224) for "1x3x224x224".

    Raises:
        ValueError: anything but positive ints between x.
    """
    parts = text.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--shape: expected positive ints like 1x3x224x224, got {text!r}")
    return tuple(int(part) for part in parts)


def parse_block(text: str) -> BlockSize:
    """(32, 16) for "32x16", (8, 8) for "8", (1, None) for "1xall".

    Raises:
        ValueError: anything else.
    """
    parts = text.lower().split("x")
    sizes = [None if part == "all" else int(part) if part.isdecimal() else 0 for part in parts]
    if len(sizes) > 2 or 0 in sizes:
        raise ValueError(f"--block: expected OUTxIN like 32x32 or 1xall, got {text!r}")
    return sizes[0], sizes[-1]


def default_shape(name: str) -> tuple[int, ...]:
    """One input for the model `name`: of 32x32 for the small nets, else of the size that its weights are made for."""
    if name in OWN:
        return 1, 3, 32, 32
    if name in torchvision.models.list_models(torchvision.models.video):
        return 1, 3, 16, *((224, 224) if name.startswith(("mvit", "swin", "s3d")) else (112, 112))
    side = 299 if name == "inception_v3" else 224
    return 1, 3, side, side


def load_model(name: str) -> nn.Module:
    """The model `name` with fresh weights, or what `package.module:callable` returns.

    Raises:
        ValueError: no such model; near names are told.
        TypeError: the callable returns something else.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        known = [*OWN, *torchvision.models.list_models()]
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ", see torchvision.models.list_models()"
            raise ValueError(f"torchvision has no model {name!r}{hint}")
        if name in OWN:
            return OWN[name]()
        quick = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        found: nn.Module = torchvision.models.get_model(name, weights=None, **quick)
        return found
    sys.path.insert(0, "")
    try:
        make = getattr(import_module(module), attribute, None)
    finally:
        sys.path.remove("")
    if make is None:
        raise ValueError(f"{module} has no {attribute!r}")
    made = make() if callable(make) and not isinstance(make, nn.Module) else make
    if not isinstance(made, nn.Module):
        raise TypeError(f"{name}: expected a callable that returns an nn.Module, got {type(made).__name__}")
    return made


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in the file `path`, tensors only; also where a training script has put it under "model".

    Raises:
        OSError, ValueError: the file cannot be read, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors: dict[str, torch.Tensor] = load_file(path)
            return tensors
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"--checkpoint: {path}: {error}") from error
    if isinstance(found, dict):
        found = next((found[key] for key in NESTED if isinstance(found.get(key), dict)), found)
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"--checkpoint: {path}: expected a state dict of tensors, got {_contents(found)}")
    for prefix in WRAPPERS:
        if found and all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): value for key, value in found.items()}
    return dict(found)


def _contents(found: Any) -> str:
    if not isinstance(found, dict):
        return type(found).__name__
    return f"a dict with {', '.join(repr(key) for key in list(found)[:5])}"


def has_scales(state: dict[str, torch.Tensor]) -> bool:
    """True for the state of a prepared model: every scale has a boolean mask of its shape."""
    masks = [key for key, value in state.items() if key.endswith("mask") and value.dtype == torch.bool]
    return any(f"{key.removesuffix('mask')}scale" in state for key in masks)


def load_state(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load `state`, read from `path`, into `model`.

    Raises:
        ValueError: names or shapes are others.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"--checkpoint: {path}: {error}") from error
