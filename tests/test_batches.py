"""Batches depend on seed, epoch and step alone: not on the number of processes or workers, nor on what came before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fxdbsr.training.batches import LoadedBatches, MemoryBatches, moved
from fxdbsr.training.processes import Processes

CPU = torch.device("cpu")


def images(count: int = 22) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(count)


class Noisy(Dataset[Any]):
    """Images that draw from the global generator when they are read."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(1, 2, 2) + index, index


def memory(rank: int = 0, count: int = 1, **options: Any) -> MemoryBatches:
    return MemoryBatches(*images(), 6, Processes(rank, count, CPU), **({"seed": 1, "shift": 2, "flip": True} | options))


def loaded(rank: int = 0, count: int = 1, workers: int = 0, seed: int | None = 1) -> LoadedBatches:
    return LoadedBatches(Noisy(), 22, 6, Processes(rank, count, CPU), workers, seed)


def test_an_epoch_is_whole_batches_of_each_image_at_most_once() -> None:
    for batches in (memory(), loaded()):
        found = [labels for _, labels in batches.epoch(0)]
        assert [len(labels) for labels in found] == [6] * 3 == [6] * len(batches)
        assert len(torch.cat(found).unique()) == 18


def test_testing_sees_every_image_once_in_order_as_it_is() -> None:
    batches = memory(seed=None)
    found = list(batches.epoch(0))
    assert len(batches) == len(found) == 4
    assert torch.equal(torch.cat([x for x, _ in found]), images()[0])
    assert torch.cat([y for _, y in loaded(seed=None).epoch(0)]).tolist() == list(range(22))


def test_the_processes_share_the_batches_of_one() -> None:
    for make in (memory, loaded):
        whole = list(make().epoch(3))
        parts = [list(make(rank, 2).epoch(3)) for rank in (0, 1)]
        for step, (x, y) in enumerate(whole):
            for rank in (0, 1):
                assert torch.equal(x[rank::2], parts[rank][step][0])
                assert torch.equal(y[rank::2], parts[rank][step][1])


def test_the_processes_test_on_every_image_once() -> None:
    for make in (memory, loaded):
        seen = [y for rank in (0, 1, 2, 3) for _, y in make(rank, 4, seed=None).epoch(0)]
        assert sorted(torch.cat(seen).tolist()) == list(range(22))


def test_an_epoch_is_the_same_again_and_others_differ() -> None:
    for batches in (memory(), loaded()):
        first, other, again = (list(batches.epoch(number)) for number in (1, 2, 1))
        assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0][0], other[0][0])


def test_workers_read_the_same_images_in_every_epoch() -> None:
    alone, helped = loaded(), loaded(workers=2)
    for number in (0, 1):
        for (x, _), (z, _) in zip(alone.epoch(number), helped.epoch(number), strict=True):
            assert torch.equal(x, z)


def test_reading_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    list(loaded().epoch(0))
    list(memory().epoch(0))
    drawn = torch.random.get_rng_state()
    assert torch.equal(state, drawn)


def test_an_image_that_is_moved_brings_zeros_in() -> None:
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    assert torch.equal(moved(x, torch.tensor([[1, 1]]), 1), x)
    expected = torch.tensor([[4.0, 5, 6], [7, 8, 9], [0, 0, 0]]).view(1, 1, 3, 3)
    assert torch.equal(moved(x, torch.tensor([[2, 1]]), 1), expected)


def test_bytes_are_standardised() -> None:
    x = torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)
    batches = MemoryBatches(x, torch.arange(2), 2, Processes(0, 1, CPU), standard=((0.2, 0.1, 0.0), (1.0, 1.0, 0.5)))
    ((found, _),) = list(batches.epoch(0))
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([0.0, 0.1, 0.4]))
