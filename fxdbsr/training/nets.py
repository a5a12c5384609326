"""The net of `fxdbsr train`: made by name for so many classes, its weights read, its convs given blocks."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from fxdbsr.api import prepare
from fxdbsr.config import BlockConfig, BlockSize, as_form
from fxdbsr.models import resnet20, vgg11_cifar
from fxdbsr.training.options import Options

OWN: dict[str, Callable[[int], nn.Module]] = {"resnet20": resnet20, "vgg11-cifar": vgg11_cifar}


def make_net(options: Options, classes: int, size: int) -> nn.Module:
    """The prepared model for images `[n, 3, size, size]` of `classes` classes, in training mode.

    Raises:
        ValueError, TypeError: no such model, one that gives something else than `classes` logits, one that cannot
            be prepared, layers or weights that it does not have.
    """
    torch.manual_seed(options.seed)
    model = load_model(options.model, classes)
    state = None if options.weights is None else read_state(Path(options.weights))
    scaled = state is not None and any(key.endswith("mask") for key in state)
    if state is not None and not scaled:
        _load(model, state, options)
    by_name = dict.fromkeys(options.skip)
    config = BlockConfig(parse_block(options.block), by_name=by_name, form=as_form(options.form))
    prepared = prepare(model, config=config, inplace=True).train()
    if state is not None and scaled:
        _load(prepared, state, options)
    _check_logits(prepared, options.model, classes, size)
    return prepared.to(memory_format=torch.channels_last)


def load_model(name: str, classes: int) -> nn.Module:
    """The model `name` with fresh weights for `classes` classes.

    `package.module:callable` is called with `num_classes=classes` where it takes that.

    Raises:
        ValueError: no such model; near names are told. TypeError: the callable returns something else.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        known = [*OWN, *torchvision.models.list_models(torchvision.models)]
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ", see torchvision.models.list_models()"
            raise ValueError(f"model: there is no {name!r}{hint}")
        if name in OWN:
            return OWN[name](classes)
        quick = {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        found: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes, **quick)
        return found
    sys.path.insert(0, "")
    try:
        make = getattr(import_module(module), attribute, None)
    finally:
        sys.path.remove("")
    if not callable(make):
        raise ValueError(f"model: {module} has no callable {attribute!r}")
    takes = inspect.signature(make).parameters
    made = make(num_classes=classes) if "num_classes" in takes else make()
    if not isinstance(made, nn.Module):
        raise TypeError(f"model: {name}: expected a callable that returns an nn.Module, got {type(made).__name__}")
    return made


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in the file `path`, tensors only; also where it lies under "model".

    Raises:
        OSError, ValueError: the file cannot be read, or holds something else.
    """
    with open(path, "rb") as file:
        try:
            found: Any = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"weights: {path} is no file of torch.save, or not a whole one: {error}") from error
    found = found.get("model", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"weights: {path}: expected a state dict of tensors, got {type(found).__name__}")
    return found


def _load(model: nn.Module, state: dict[str, Tensor], options: Options) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"weights: {options.weights} does not fit {options.model}: {error}") from error


def _check_logits(model: nn.Module, name: str, classes: int, size: int) -> None:
    example = torch.zeros(2, 3, size, size)
    with torch.no_grad():
        try:
            logits = model.eval()(example)
        except Exception as error:
            raise ValueError(f"model: {name} fails on images of {size}x{size}: {error}") from error
    model.train()
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model: {name}: expected logits of shape (2, {classes}) for 2 images, got {got}")


def parse_block(text: str) -> BlockSize:
    """(32, 16) for "32x16", (8, 8) for "8", (1, None) for "1xall".

    Raises:
        ValueError: anything else.
    """
    parts = text.lower().split("x")
    sizes = [None if part == "all" else int(part) if part.isdecimal() else 0 for part in parts]
    if len(sizes) > 2 or 0 in sizes:
        raise ValueError(f"block: expected OUTxIN like 32x32 or 1xall, got {text!r}")
    return sizes[0], sizes[-1]
