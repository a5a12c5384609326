"""`fxdbsr demo`: a small ResNet on real images, from training with block scales to packed BSR, checked equal.

ResNet-20 (16/32/64 channels) with blocks of 8x8 on scikit-learn's digits at 32x32: a dense net and, for as
many epochs, one whose blocks a `Sparsifier` brings to zero; then both accuracies, the table of FLOPs, a
picture of the masks, and how far the converted model's outputs are from the prepared one's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fxdbsr.api import convert, prepare
from fxdbsr.commands.output import add_json, check_outputs, put
from fxdbsr.digits import SIZE, accuracy, learning_rate, load_digits, predict, train_epoch
from fxdbsr.images import ImageSet
from fxdbsr.models import resnet20
from fxdbsr.nn.packed import PackedConv
from fxdbsr.picture import save_masks
from fxdbsr.reporting.build import report
from fxdbsr.scales import param_groups
from fxdbsr.sparsifier import Sparsifier

TARGET = 0.65
EPOCHS = 12
BATCH = 64
BLOCK_SIZE = (8, 8)
EXAMPLES = """\
examples:
  fxdbsr demo
  fxdbsr demo --target 0.8 --epochs 20
  fxdbsr demo --gamma 0.01 --json
"""
_EXTRA = {"sklearn": "scikit-learn", "tqdm": "tqdm", "matplotlib": "matplotlib"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fxdbsr demo` to `parser`."""
    parser.epilog = EXAMPLES
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--target",
        type=float,
        metavar="T",
        help=f"fraction of the convs' MACs that shall be zero (default {TARGET})",
    )
    mode.add_argument("--gamma", type=float, metavar="G", help="strength of the penalty on the scales instead")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and batches (default 0)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of each net (default {EPOCHS})")
    add_json(parser)
    parser.add_argument("--out", type=Path, default=Path("fxdbsr-demo"), metavar="DIR", help="folder of the picture")


def run(args: argparse.Namespace) -> int:
    """Run the demo with the options of `add_arguments`; the exit status.

    Raises:
        ImportError, ValueError, TypeError, OSError: an extra that is not installed, an option out of its range, a
            path that cannot be written.
    """
    _check(args)
    figures, words = demonstrate(args)
    if args.json != "-":
        put("-", words)
    if args.json is not None:
        put(args.json, json.dumps(figures, indent=2))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse at once what would fail after minutes of training.

    Raises:
        ImportError, ValueError, OSError: an extra that is not installed, an option out of its range, a path
            that cannot be written.
    """
    missing = [name for module, name in _EXTRA.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not found: pip install 'fxdbsr[demo]'")
    if args.epochs < 1:
        raise ValueError(f"--epochs: expected at least 1, got {args.epochs}")
    args.out.mkdir(parents=True, exist_ok=True)
    check_outputs(str(args.out / "masks.png"), args.json)


def demonstrate(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Train, convert and compare; the figures of the JSON file, and the same in words.

    Raises:
        ValueError, TypeError: a target or gamma out of its range.
    """
    start = time.perf_counter()
    data = load_digits()
    steps = args.epochs * (len(data.train_labels) // BATCH)
    example = torch.zeros(1, 1, SIZE, SIZE)

    dense, sparse = (_net(args.seed), prepare(_net(args.seed), BLOCK_SIZE))
    optimizers = [_optimizer(model) for model in (dense, sparse)]
    target = TARGET if args.target is None and args.gamma is None else args.target
    schedules = [LambdaLR(optimizer, lambda step: learning_rate(step, steps)) for optimizer in optimizers]
    sparsifier = Sparsifier(
        sparse, optimizers[1], target=target, of="macs", steps=steps, gamma=args.gamma, end=0.67,
        lr_schedule=schedules[1], example_inputs=example,
    )  # fmt: skip
    with Progress(2 * steps) as progress:
        _train(dense, optimizers[0], schedules[0], data, args, progress.of("dense", args.epochs))
        _train(sparse, optimizers[1], schedules[1], data, args, progress.of("sparse", args.epochs))

    expected = predict(sparse, data.test_images)
    packed, auto = convert(sparse, backend="reference"), convert(sparse)
    errors = [float((predict(m, data.test_images) - expected).abs().max()) for m in (packed, auto)]
    table = report(auto, example)
    picture = args.out / "masks.png"
    save_masks(sparse, picture)
    figures = {
        "dense_accuracy": accuracy(predict(dense, data.test_images), data.test_labels),
        "accuracy": accuracy(expected, data.test_labels),
        "sparsity": sparsifier.sparsity("blocks"),
        "macs_dense": int(report(sparse, example).total.macs_dense),
        "macs": int(table.total.macs),
        "layers_packed": sum(isinstance(module, PackedConv) for module in packed.modules()),
        "max_abs_error": max(errors),
        "seconds": time.perf_counter() - start,
    }
    return figures, "\n".join([str(table), "", *_summary(figures, errors, picture)])


def _summary(figures: dict[str, Any], errors: Sequence[float], picture: Path) -> list[str]:
    saved = 1 - figures["macs"] / figures["macs_dense"]
    return [
        f"accuracy          dense {figures['dense_accuracy']:.2%}, sparse {figures['accuracy']:.2%}",
        f"zero blocks       {figures['sparsity']:.1%} of all blocks of 8x8",
        f"MACs              {figures['macs_dense']:,} to {figures['macs']:,} an image ({saved:.1%} less)",
        f"largest |error|   {errors[0]:.2e} with every layer packed (backend reference), {errors[1]:.2e} auto",
        f"picture of masks  {picture}",
        f"time              {figures['seconds']:.0f} s",
    ]


def _net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return resnet20(10, in_channels=1).to(memory_format=torch.channels_last)


def _optimizer(model: nn.Module) -> torch.optim.SGD:
    groups = param_groups(model, weight_decay=5e-4)
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: LambdaLR,
    data: ImageSet,
    args: argparse.Namespace,
    on_step: Callable[[float], None],
) -> None:
    generator = torch.Generator().manual_seed(args.seed)

    def after(loss: float) -> None:
        schedule.step()
        on_step(loss)

    for _ in range(args.epochs):
        train_epoch(model, optimizer, data, BATCH, generator, after)


class Progress:
    """A bar of `total` steps on a terminal, a line after each epoch elsewhere; both on stderr."""

    def __init__(self, total: int) -> None:
        self.total, self._bar = total, None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, unit="step", dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def of(self, name: str, epochs: int) -> Callable[[float], None]:
        """What to call with the loss after each step of the net `name`."""
        step, each = 0, self.total // 2 // epochs

        def on_step(loss: float) -> None:
            nonlocal step
            step += 1
            if self._bar is not None:
                self._bar.set_description(f"{name}, epoch {-(-step // each)} of {epochs}, loss {loss:.3f}", False)
                self._bar.update()
            elif step % each == 0:
                print(
                    f"{name:6}  epoch {step // each:2} of {epochs}  loss {loss:.3f}",
                    file=sys.stderr,
                    flush=True,
                )

        return on_step
