"""Where commands get their models from: names, checkpoints, and the options that prepare and prune them."""

from __future__ import annotations

import argparse
import difflib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from fxdbsr.api import prepare
from fxdbsr.commands.checkpoint import Checkpoint, read_checkpoint
from fxdbsr.config import BlockSize
from fxdbsr.models import resnet20, vgg11_cifar
from fxdbsr.passes.selection import CONV_TYPES
from fxdbsr.ranking import block_prune_

OWN: dict[str, Callable[[int], nn.Module]] = {"resnet20": resnet20, "vgg11-cifar": vgg11_cifar}


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


@dataclass
class Source:
    """What `args` of `add_source` name: the model, the shape of its input, and the history in its checkpoint."""

    model: nn.Module
    shape: tuple[int, ...]
    history: list[Mapping[str, Any]]


def load_source(args: argparse.Namespace, prepared: bool = False) -> Source:
    """The model that `args` name, with its weights and blocks.

    Args:
        prepared: prepare it in any case, not only where a block size, a sparsity or the checkpoint ask for it.

    Raises:
        ValueError, TypeError, OSError: an option is wrong, or the checkpoint does not fit.
    """
    shape = None if args.shape is None else parse_shape(args.shape)
    if args.sparsity is not None and not 0 <= args.sparsity <= 1:
        raise ValueError(f"--sparsity: expected a fraction from 0 to 1, got {args.sparsity}")
    checkpoint = None if args.checkpoint is None else read_checkpoint(args.checkpoint)
    block = args.block or (checkpoint.block if checkpoint else None)
    size = None if block is None else parse_block(block)
    torch.manual_seed(args.seed)
    model = load_model(args.model, checkpoint.classes if checkpoint else None)
    if checkpoint is not None and checkpoint.prepared:
        model = _prepared_as(checkpoint, model, size)
    else:
        if checkpoint is not None:
            checkpoint.load_into(model)
        if prepared or args.block is not None or args.sparsity is not None:
            model = prepare(model, size or (32, 32))
    if args.sparsity is not None:
        generator = torch.Generator().manual_seed(args.seed)
        block_prune_(model, args.sparsity, score=args.score, generator=generator)
    return Source(model, shape or default_shape(args.model), checkpoint.history if checkpoint else [])


def _prepared_as(checkpoint: Checkpoint, model: nn.Module, size: BlockSize | None) -> nn.Module:
    """`model` with blocks of `size` where `checkpoint` has scales, and the checkpoint loaded into it."""
    if size is None:
        raise ValueError(f"--block: {checkpoint.path} holds block scales, so say the blocks of its model, like 32x32")
    types = [*CONV_TYPES, nn.Linear]
    model = prepare(model, size, filter_fn=checkpoint.is_blocked, types=types, form=checkpoint.form)
    checkpoint.load_into(model)
    return model


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


def load_model(name: str, classes: int | None = None, **options: Any) -> nn.Module:
    """The model `name` with fresh weights, or what `package.module:callable` returns.

    Args:
        classes: of the model, as `num_classes` of a callable that takes it; None for its default.
        options: of the models GoogLeNet and Inception v3; `init_weights=False` by default, which takes them seconds.

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
            return OWN[name](classes or 10)
        given = {"init_weights": False} | options if name in ("googlenet", "inception_v3") else {}
        given |= {} if classes is None else {"num_classes": classes}
        found: nn.Module = torchvision.models.get_model(name, weights=None, **given)
        return found
    if not module or not attribute:
        raise ValueError(f"model: expected a name, or package.module:callable, got {name!r}")
    sys.path.insert(0, "")
    try:
        make = getattr(import_module(module), attribute, None)
    finally:
        sys.path.remove("")
    if make is None:
        raise ValueError(f"{module} has no {attribute!r}")
    if callable(make) and not isinstance(make, nn.Module):
        takes = classes is not None and "num_classes" in inspect.signature(make).parameters
        made = make(num_classes=classes) if takes else make()
    else:
        made = make
    if not isinstance(made, nn.Module):
        raise TypeError(f"{name}: expected a callable that returns an nn.Module, got {type(made).__name__}")
    return made
