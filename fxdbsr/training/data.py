"""The data sets of `fxdbsr train`: torchvision's readers on files that are there, digits, generated images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.transforms import v2

from fxdbsr.digits import load_digits
from fxdbsr.generated import SHAPES, TEXTURES, load_generated
from fxdbsr.images import ImageSet
from fxdbsr.training.batches import Batches, LoadedBatches, MemoryBatches
from fxdbsr.training.options import Options
from fxdbsr.training.processes import Processes

# Mean and deviation of the training images' channels, of values from 0 to 1.
CIFAR = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Data:
    """Images `[n, 3, size, size]` of `classes` classes, to train on and to test on."""

    classes: int
    size: int
    train: Batches
    test: Batches


def load_data(options: Options, processes: Processes) -> Data:
    """The data set that `options` name.

    Raises:
        OSError: its files are not there. ValueError: they are others, or too few for a batch.
        ImportError: scikit-learn is needed for digits.
    """
    makers: dict[str, Callable[[Options, Processes], Data]] = {
        "digits": _digits,
        "generated": _generated,
        "cifar10": _cifar,
        "cifar100": _cifar,
        "imagefolder": _folder,
    }
    if options.batch_size % (processes.count * options.accumulate):
        raise ValueError(
            f"batch_size: {options.batch_size} cannot be shared by {processes.count} processes in "
            f"{options.accumulate} parts each"
        )
    data = makers[options.data](options, processes)
    if len(data.train) == 0:
        raise ValueError(f"batch_size: there are fewer than {options.batch_size} images to train on")
    return data


def _digits(options: Options, processes: Processes) -> Data:
    found = load_digits()
    parts = [images.expand(-1, 3, -1, -1) for images in (found.train_images, found.test_images)]
    return _in_memory(ImageSet(parts[0], found.train_labels, parts[1], found.test_labels), 10, options, processes)


def _generated(options: Options, processes: Processes) -> Data:
    found = load_generated(size=options.image_size or 32, difficulty=options.difficulty)
    return _in_memory(found, len(SHAPES) * len(TEXTURES), options, processes)


def _in_memory(found: ImageSet, classes: int, options: Options, processes: Processes) -> Data:
    train = MemoryBatches(
        found.train_images, found.train_labels, options.batch_size, processes, seed=options.seed, shift=2
    )
    test = MemoryBatches(found.test_images, found.test_labels, options.batch_size, processes)
    return Data(classes, found.train_images.shape[-1], train, test)


def _cifar(options: Options, processes: Processes) -> Data:
    kind: Any = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[options.data]
    root = Path(str(options.data_dir)).expanduser()

    def read(train: bool, download: bool = False) -> tuple[Tensor, Tensor]:
        try:
            found = kind(root, train=train, download=download)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"data_dir: {root / kind.base_folder} does not hold {options.data} as published; "
                "fxdbsr train --download fetches it"
            ) from error
        return torch.from_numpy(found.data).permute(0, 3, 1, 2), torch.tensor(found.targets)

    if options.download and processes.is_first:
        read(True, download=True)
    processes.wait()
    images, labels = read(True)
    standard = CIFAR[options.data]
    batch = options.batch_size
    train = MemoryBatches(images, labels, batch, processes, options.seed, shift=4, flip=True, standard=standard)
    return Data(
        10 if options.data == "cifar10" else 100,
        images.shape[-1],
        train,
        MemoryBatches(*read(False), batch, processes, standard=standard),
    )


def _folder(options: Options, processes: Processes) -> Data:
    size = options.image_size or 224
    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET)]
    ways = {
        "train": [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *last],
        "val": [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size), *last],
    }
    found: dict[str, Any] = {}
    for part, way in ways.items():
        folder = Path(str(options.data_dir)).expanduser() / part
        if not folder.is_dir():
            raise FileNotFoundError(f"data_dir: there is no folder {folder}; expected train/ and val/ with one a class")
        found[part] = torchvision.datasets.ImageFolder(folder, v2.Compose(way))
    if found["train"].classes != found["val"].classes:
        raise ValueError(f"data_dir: the classes of train/ and val/ in {options.data_dir} are not the same")
    make = LoadedBatches
    counts = {part: len(images) for part, images in found.items()}
    batch, workers = options.batch_size, options.workers
    return Data(
        len(found["train"].classes),
        size,
        make(found["train"], counts["train"], batch, processes, workers, options.seed),
        make(found["val"], counts["val"], batch, processes, workers, None),
    )
