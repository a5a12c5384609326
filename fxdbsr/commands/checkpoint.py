"""A state dict from a file, and what the file says about the model that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NESTED = ("model", "state_dict", "model_state_dict")  # keys under which training scripts keep the state dict
WRAPPERS = ("module.", "_orig_mod.")


@dataclass
class Checkpoint:
    """A state dict.

    Attributes:
        path: where it was read; `option` named it.
        state: tensors by name, without the prefixes of DistributedDataParallel and torch.compile.
        block, form: size of the blocks and form of the scales, where the file states them, as `fxdbsr train` does.
        history: entries of the training, where the file holds them.
    """

    path: Path
    state: dict[str, Tensor]
    block: str | None = None
    form: str = "product"
    history: list[Mapping[str, Any]] = field(default_factory=list)
    option: str = "--checkpoint"

    @property
    def prepared(self) -> bool:
        """True where the state is that of a prepared model: boolean masks, each with a scale."""
        masks = [key for key, value in self.state.items() if key.endswith("mask") and value.dtype == torch.bool]
        return any(f"{key.removesuffix('mask')}scale" in self.state for key in masks)

    @property
    def classes(self) -> int | None:
        """Outputs of the last conv or linear layer, or None where there is none."""
        weights = [value for key, value in self.state.items() if key.endswith("weight") and value.ndim >= 2]
        return len(weights[-1]) if weights else None

    def is_blocked(self, module: nn.Module, name: str) -> bool:
        """True for layers, and for weights of functional convs, that have a scale here."""
        return f"{name}.scale" in self.state or f"{name}_scale" in self.state

    def load_into(self, model: nn.Module) -> None:
        """Load the state.

        Raises:
            ValueError: names or shapes are others.
        """
        try:
            model.load_state_dict(self.state)
        except RuntimeError as error:
            raise ValueError(f"{self.option}: {self.path}: {error}") from error


def read_checkpoint(path: Path, option: str = "--checkpoint") -> Checkpoint:
    """The checkpoint in the file `path`, tensors and plain values only; no code of the file is run.

    Args:
        path: of the file.
        option: where the user named it, for errors.

    Raises:
        OSError, ValueError: the file cannot be read, or holds no state dict. ImportError: without safetensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return Checkpoint(path, dict(load_file(path)), option=option)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # else torch's, at a place that is cut off
            raise
        cause = str(error) or type(error).__name__
        raise ValueError(f"{option}: {path}: no checkpoint, or damaged: {cause}") from error
    whole = found if isinstance(found, dict) else {}
    state = next((whole[key] for key in NESTED if isinstance(whole.get(key), dict)), found)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{option}: {path}: expected a state dict of tensors, got {_contents(state)}")
    for prefix in WRAPPERS:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    options = whole["options"] if isinstance(whole.get("options"), dict) else {}
    history = whole["history"] if isinstance(whole.get("history"), list) else []
    block, form = options.get("block"), options.get("form", "product")
    if not isinstance(block, str | None) or not isinstance(form, str):
        raise ValueError(f"{option}: {path}: expected the options of a training, got block {block!r} and form {form!r}")
    return Checkpoint(path, state, block, form, history, option)


def _contents(found: Any) -> str:
    if not isinstance(found, dict):
        return type(found).__name__
    return f"a dict with {', '.join(repr(key) for key in list(found)[:5])}"
