"""scikit-learn's bundled handwritten digits as images of 32x32, and training a classifier on them.

1,797 real images of 8x8 pixels (UCI, optical recognition of handwritten digits), 10 classes; no download.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fxdbsr.images import ImageSet, standardised

SIZE = 32
SHIFT = 2


def load_digits(test_size: int = 450) -> ImageSet:
    """The digits, upscaled bilinearly, split once and for all into parts with equal shares of the classes."""
    from sklearn import datasets, model_selection

    data = datasets.load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(data.target).long()
    train, test = (
        torch.from_numpy(part)
        for part in model_selection.train_test_split(
            torch.arange(len(labels)).numpy(), test_size=test_size, random_state=0, stratify=labels.numpy()
        )
    )
    return standardised((images[train], labels[train]), (images[test], labels[test]))


def learning_rate(step: int, steps: int, warmup: float = 0.05) -> float:
    """Factor on the learning rate: linear to 1 in the first `warmup` of the steps, then a cosine to 0."""
    if step < warmup * steps:
        return (step + 1) / (warmup * steps + 1)
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    data: ImageSet,
    batch: int,
    generator: torch.Generator,
    on_step: Callable[[float], None],
) -> None:
    """One pass over the training part in whole batches of `batch`, shifted by up to 2 pixels.

    Args:
        model: gives logits.
        optimizer: of the model.
        data: the digits.
        batch: images in a step.
        generator: draws the order and the shifts.
        on_step: is called with the loss after every step.
    """
    model.train()
    order = torch.randperm(len(data.train_labels), generator=generator)
    for start in range(0, len(order) - batch + 1, batch):
        chosen = order[start : start + batch]
        shift = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
        images = torch.roll(data.train_images[chosen], shift, (2, 3))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), data.train_labels[chosen])
        torch.autograd.backward(loss)
        optimizer.step()
        on_step(float(loss.detach()))


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits `[N, classes]` of `model` in eval mode."""
    model.eval()
    return torch.cat([model(part) for part in images.split(128)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Fraction of the labels that are hit."""
    return float((logits.argmax(1) == labels).double().mean())
