"""Checkpoints of `fxdbsr train`: written in one step or not at all, refused where they are damaged or foreign."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxdbsr.files import as_path, unfinished
from fxdbsr.training.nets import make_net
from fxdbsr.training.options import Options

FORMAT = "fxdbsr training 1"
PARTS = (
    "net", "optimizer", "model", "options", "classes", "size", "epoch", "history", "sparsifier", "scaler", "ema_steps",
)  # fmt: skip
# What may differ between a run and its continuation without changing what is trained.
FREE = ("out", "resume", "workers", "device", "data_dir", "download")


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` in one step, on disk when this returns.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    write(path, buffer.getbuffer())


def write(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to `path` in one step, on disk when this returns.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    part = unfinished(path)
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        kept = "; what was there before is untouched" if path.exists() else ""
        raise OSError(f"cannot write {path}: {error.strerror or error}{kept}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises:
        OSError: it cannot be read. ValueError: it is damaged, or not written by `fxdbsr train`.
    """
    with open(path, "rb") as file:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: not a checkpoint, or not a whole one: {reason}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        got = sorted(map(str, found))[:5] if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path}: expected a checkpoint of fxdbsr train ({FORMAT!r}), got {got}")
    if missing := sorted(set(PARTS) - set(found)):
        raise ValueError(f"{path}: damaged checkpoint: it lacks {missing}")
    return found


def check_same_run(path: Path, found: Mapping[str, Any], options: Options) -> None:
    """Refuse to go on with other options than those of the checkpoint `found` in `path`.

    Raises:
        ValueError: one differs that changes what is trained.
    """
    now = options.to_dict()
    for key, value in found["options"].items():
        if key not in FREE and now.get(key) != value:
            raise ValueError(f"{path} was written with {key} = {value!r}, now it is {now.get(key)!r}")


def load_trained(path: str | os.PathLike[str]) -> nn.Module:
    """The prepared model of a checkpoint of `fxdbsr train`, in eval mode; the average, where one was kept.

    Ready for `fxdbsr.convert` and `fxdbsr.report`. The file holds its state dict under "model". It is read as data; the
    net is made by the function that it names, which is yours where that is `package.module:callable`.

    Raises:
        OSError: the file cannot be read. ValueError: it is no such checkpoint. TypeError: `path` is no path.
    """
    path = as_path(path)
    found = load(path)
    try:
        options = Options.of_dict(found["options"] | {"weights": None}, str(path))
        model = make_net(options, found["classes"], found["size"])
        model.load_state_dict(found["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged checkpoint: {error}") from error
    return model.eval()
