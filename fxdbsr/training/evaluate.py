"""Evaluating a model on the images to test on, shared by all processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from fxdbsr.scales import evaluation
from fxdbsr.training.batches import Batch, Batches
from fxdbsr.training.options import Options
from fxdbsr.training.parts import autocast
from fxdbsr.training.processes import Processes


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, size: int, options: Options, processes: Processes
) -> tuple[float, float]:
    """Fractions of the images whose class is the most likely, and among the five most likely.

    Args:
        model: gives logits; the same on all processes, but for statistics of norms, which become their mean.
        batches: all images once.
        size: height and width of the images.
        options: for autocast.
        processes: share the batches.
    """
    processes.average_(model.buffers())
    device = processes.device
    hits = torch.zeros(3, device=device, dtype=torch.float64)
    with evaluation(model):
        for images, labels in _padded(batches, size):
            with autocast(options, device):
                logits = model(images.to(device).contiguous(memory_format=torch.channels_last))
            best = logits[: len(labels)].topk(min(5, logits.shape[1])).indices.eq(labels.to(device).unsqueeze(1))
            hits += torch.stack([best[:, 0].sum(), best.sum(), torch.tensor(len(labels), device=device)])
    top1, top5, count = processes.sum(hits).tolist()
    return top1 / count, top5 / count


def _padded(batches: Batches, size: int) -> Iterator[Batch]:
    """As many batches on every process: where one has no images left, an image that no label goes with."""
    nothing = torch.zeros(1, 3, size, size), torch.zeros(0, dtype=torch.int64)
    own = batches.epoch(0)
    for _ in range(len(batches)):
        images, labels = next(own, nothing)
        yield (images, labels) if len(labels) else nothing
