"""`Options`: what `fxdbsr train` can be asked for, with types, defaults and help.

One field is one option everywhere: `batch_size` here and in TOML is `--batch-size` on the command line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args, get_type_hints

DATA = ("digits", "cifar10", "cifar100", "imagefolder", "generated")
WAYS = ("target", "gamma", "shrink")


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Options:
    """What `fxdbsr train` was asked for."""

    model: str = _option("resnet20", "torchvision name, resnet20, vgg11-cifar, or package.module:callable")
    data: str = _option("digits", "images to train on", DATA)
    data_dir: str | None = _option(None, "where cifar10, cifar100 or the folders train/ and val/ of imagefolder lie")
    download: bool = _option(False, "fetch cifar10 or cifar100 into data_dir where it is not there")
    image_size: int | None = _option(None, "height and width of the images (imagefolder: 224, generated: 32)")
    difficulty: float = _option(0.5, "of generated images, 0 to 1")
    weights: str | None = _option(None, "start from this state dict, of the dense or the prepared model")
    block: str = _option("32x32", "size of the blocks, OUTxIN; 'all' is the whole axis: 1xall is filter sparsity")
    skip: tuple[str, ...] = _option((), "layers to leave dense")
    form: str = _option("product", "mask: no trainable scales; clamp: the authors'", ("product", "clamp", "mask"))
    target: float | None = _option(None, "fraction of the cost that shall be zero (0.5 unless gamma or shrink is set)")
    gamma: float | None = _option(None, "strength of the penalty on the scales, in place of a target")
    shrink: float | None = _option(None, "how far the penalty moves a scale in all, in place of a target")
    of: str = _option("macs", "the cost", ("blocks", "params", "macs"))
    begin: float | None = _option(None, "fraction of the steps before blocks go (target: 0.3, else 0)")
    end: float | None = _option(None, "fraction of the steps after which the mask is frozen (target: 0.67, else 1)")
    epochs: int = _option(20, "passes over the training images")
    batch_size: int = _option(64, "images in a step, over all processes")
    accumulate: int = _option(1, "parts in which a process takes its share of a batch, one after the other")
    optimizer: str = _option("sgd", "SGD with Nesterov momentum, or AdamW", ("sgd", "adamw"))
    lr: float = _option(0.1, "highest learning rate; linear warmup, then a cosine to 0")
    momentum: float = _option(0.9, "of sgd")
    weight_decay: float = _option(5e-4, "of the weights; scales, biases and norms have none")
    warmup: float = _option(0.05, "fraction of the steps in which the learning rate rises")
    clip: float | None = _option(None, "norm to which gradients are scaled down where theirs is larger")
    label_smoothing: float = _option(0.0, "of the cross entropy")
    amp: str = _option("off", "autocast to half precision; scales stay float32", ("off", "bf16", "fp16"))
    ema: float | None = _option(None, "decay of an average of the weights, which is then what is evaluated: 0.999")
    compile: bool = _option(False, "torch.compile the model")
    workers: int = _option(4, "processes of each process that read imagefolder")
    parallel: str = _option("ddp", "under torchrun: replicas, or shards by fully_shard", ("ddp", "fsdp"))
    device: str = _option("auto", "cpu, cuda, ...; auto takes a GPU where there is one")
    seed: int = _option(0, "of weights, order and augmentation")
    out: str = _option("fxdbsr-train", "folder of best.pt, last.pt and log.jsonl")
    resume: bool = _option(False, "go on from last.pt, if there is one")

    def to_dict(self) -> dict[str, Any]:
        """The options as plain types."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def of_dict(cls, values: Mapping[str, Any], where: str) -> Options:
        """The options with these values, checked; `where` they come from stands in the errors.

        Raises:
            ValueError, TypeError: an unknown key, a value of the wrong type or out of its range.
        """
        known = {f.name: f for f in fields(cls)}
        kinds = get_type_hints(cls)
        made: dict[str, Any] = {}
        for key, value in values.items():
            if key not in known:
                raise ValueError(f"{where}: unknown option {key!r}; there are {', '.join(known)}")
            made[key] = _typed(value, kinds[key], f"{where}: {key}")
            choices = known[key].metadata["choices"]
            if choices is not None and made[key] not in choices:
                raise ValueError(f"{where}: {key}: expected one of {choices}, got {value!r}")
        if not any(made.get(way) is not None for way in WAYS):
            made["target"] = 0.5
        options = cls(**made)
        options.check()
        return options

    def check(self) -> None:
        """Refuse values out of their range.

        Raises:
            ValueError: one is.
        """
        for key in ("epochs", "batch_size", "accumulate", "image_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}: expected at least 1, got {value}")
        for key in ("lr", "weight_decay", "workers", "seed"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key}: expected a finite number that is not negative, got {getattr(self, key)}")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip: expected a positive finite number, got {self.clip}")
        if self.seed >= 2**64:
            raise ValueError(f"seed: expected a number below 2**64, got {self.seed}")
        for key in ("momentum", "label_smoothing", "warmup", "ema"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{key}: expected a number in [0, 1), got {value}")
        if self.data in ("cifar10", "cifar100", "imagefolder") and self.data_dir is None:
            raise ValueError(f"data_dir: {self.data} needs the folder where its files lie, got none")
        if self.ema is not None and self.parallel == "fsdp":
            raise ValueError("ema: goes with parallel='ddp', not with shards")


def _typed(value: Any, kind: Any, where: str) -> Any:
    """`value` as `kind`, an annotation of `Options`."""
    kinds = get_args(kind) if type(None) in get_args(kind) else (kind,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if get_args(kind) and isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    plain = tuple if get_args(kind) else kind
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise TypeError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {value!r}")
    return value
