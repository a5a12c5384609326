"""Batches of images, the same for the same seed, epoch and step, however many processes and workers there are.

A batch is drawn for all processes together; each takes every `count`-th image of it. What augments an image is
drawn from (seed, epoch, place in the order), never from a generator that runs on: so a resumed run sees what the
whole one saw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fxdbsr.training.processes import Processes

Batch = tuple[Tensor, Tensor]


class Batches(Protocol):
    """What an epoch draws its batches from: images `[n, channels, H, W]` float32, labels `[n]`, on the CPU."""

    def __len__(self) -> int:
        """Batches in an epoch."""

    def epoch(self, number: int) -> Iterator[Batch]:
        """This process's part of every batch of the epoch `number`."""


def seed_of(*numbers: int) -> int:
    """A seed for these numbers; others for others, but for accidents."""
    mixed = 0
    for number in numbers:
        mixed = ((mixed ^ number) * 6364136223846793005 + 1442695040888963407) % 2**63
    return mixed


def batches_in(count: int, batch: int, seed: int | None) -> int:
    """How many batches `order` gives."""
    return -(-count // batch) if seed is None else count // batch


def order(count: int, batch: int, seed: int | None, epoch: int) -> list[Tensor]:
    """The images of every batch of the epoch: whole batches in random order, or, without a seed, all in theirs."""
    if seed is None:
        return list(torch.arange(count).split(batch))
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))
    return list(shuffled[: count // batch * batch].split(batch))


class MemoryBatches:
    """Batches of images that are held in memory.

    Args:
        images: `[N, channels, H, W]`, float32, or uint8 with `standard`.
        labels: `[N]`.
        batch: images in a batch of all processes together.
        seed: of the order and of what augments; None for all images in their order, as they are.
        shift: pixels by which images are moved at most, zeros coming in.
        flip: whether half of the images are mirrored.
        standard: mean and deviation of every channel, of values from 0 to 1, that standardise uint8 images.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch: int,
        processes: Processes,
        seed: int | None = None,
        shift: int = 0,
        flip: bool = False,
        standard: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        self.images, self.labels, self.batch, self.processes = images, labels, batch, processes
        self.seed, self.shift, self.flip, self.standard = seed, shift, flip, standard

    def __len__(self) -> int:
        """Batches in an epoch."""
        return batches_in(len(self.labels), self.batch, self.seed)

    def epoch(self, number: int) -> Iterator[Batch]:
        """This process's part of every batch of the epoch `number`."""
        for step, chosen in enumerate(order(len(self.labels), self.batch, self.seed, number)):
            mine = slice(self.processes.rank, None, self.processes.count)
            images = self.images[chosen[mine]]
            if self.standard is not None:
                mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in self.standard)
                images = (images / 255 - mean) / deviation
            if self.seed is not None:
                draw = torch.Generator().manual_seed(seed_of(self.seed, number, step))
                images = self._augmented(images, len(chosen), mine, draw)
            yield images, self.labels[chosen[mine]]

    def _augmented(self, images: Tensor, count: int, mine: slice, draw: torch.Generator) -> Tensor:
        moves = torch.randint(2 * self.shift + 1, (count, 2), generator=draw)[mine]
        flips = (torch.rand(count, generator=draw) < 0.5)[mine]
        if self.flip:
            images = torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)
        if self.shift:
            images = moved(images, moves, self.shift)
        return images


def moved(images: Tensor, moves: Tensor, reach: int) -> Tensor:
    """`images [N, channels, H, W]` cut out at `moves [N, 2]`, from 0 to 2 `reach`, of a frame of zeros around them."""
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (reach,) * 4)
    rows = moves[:, :1] + torch.arange(height)
    columns = moves[:, 1:] + torch.arange(width)
    found: Tensor = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return found.permute(0, 3, 1, 2)


class LoadedBatches:
    """Batches of images that workers read: as `MemoryBatches`, of a data set of (image, label).

    The data set's transforms may draw from torch's global generator.
    """

    def __init__(
        self, images: Dataset[Any], count: int, batch: int, processes: Processes, workers: int, seed: int | None
    ) -> None:
        self.count, self.batch, self.processes, self.seed = count, batch, processes, seed
        self._places = _Places(self)
        self._loader = DataLoader(
            _Seeded(images, seed or 0),
            batch_sampler=self._places,
            num_workers=workers,
            generator=torch.Generator(),  # not the global one, which the model's dropouts draw from
            persistent_workers=workers > 0,
            pin_memory=processes.device.type == "cuda",
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return batches_in(self.count, self.batch, self.seed)

    def epoch(self, number: int) -> Iterator[Batch]:
        """This process's part of every batch of the epoch `number`."""
        self._places.epoch = number
        yield from self._loader


class _Places:
    """For every batch the (epoch, index) of this process's images: workers learn the epoch from them."""

    def __init__(self, batches: LoadedBatches) -> None:
        self.batches, self.epoch = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        of = self.batches
        for chosen in order(of.count, of.batch, of.seed, self.epoch):
            mine = chosen[of.processes.rank :: of.processes.count].tolist()
            if mine:
                yield [(self.epoch, index) for index in mine]


class _Seeded(Dataset[Any]):
    """Items of `images` by (epoch, index), each drawn with a seed of its own."""

    def __init__(self, images: Any, seed: int) -> None:
        self.images, self.seed = images, seed

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, epoch, index))
            try:
                return self.images[index]
            except OSError as error:
                name = self.images.samples[index][0] if hasattr(self.images, "samples") else index
                raise ValueError(f"{name}: cannot be read as an image: {error}") from error
