"""The net of `fxdbsr train`: made by name for so many classes, its weights read, its convs given blocks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fxdbsr.api import prepare
from fxdbsr.commands.checkpoint import read_checkpoint
from fxdbsr.commands.source import load_model, parse_block
from fxdbsr.config import BlockConfig, as_form
from fxdbsr.training.options import Options


def make_net(options: Options, classes: int, size: int) -> nn.Module:
    """The prepared model for images `[n, 3, size, size]` of `classes` classes, in training mode.

    Raises:
        ValueError, TypeError, OSError: no such model, one that gives something else than `classes` logits, one that
            cannot be prepared, layers or weights that it does not have.
    """
    torch.manual_seed(options.seed)
    block = parse_block(options.block)
    model = load_model(options.model, classes, init_weights=True, aux_logits=False)
    start = None if options.weights is None else read_checkpoint(Path(options.weights).expanduser(), "--weights")
    if start is not None and not start.prepared:
        start.load_into(model)
    config = BlockConfig(block, by_name=dict.fromkeys(options.skip), form=as_form(options.form))
    prepared = prepare(model, config=config, inplace=True).train()
    if start is not None and start.prepared:
        start.load_into(prepared)
    _check_logits(prepared, options.model, classes, size)
    return prepared.to(memory_format=torch.channels_last)


def _check_logits(model: nn.Module, name: str, classes: int, size: int) -> None:
    example = torch.zeros(2, 3, size, size)
    with torch.no_grad():
        try:
            logits = model.eval()(example)
        except Exception as error:
            raise ValueError(f"--model: {name} fails on images of {size}x{size}: {error}") from error
    model.train()
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"--model: {name}: expected logits of shape (2, {classes}) for 2 images, got {got}")
