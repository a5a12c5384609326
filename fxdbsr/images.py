"""`ImageSet`: labelled images in memory, in a part to train on and a part to test on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Images `[N, channels, H, W]` float32, standardised, channels_last, and labels `[N]` int64 of each part."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def standardised(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> ImageSet:
    """The set of two pairs (images, labels); mean 0 and deviation 1 over the images to train on."""
    mean, deviation = train[0].mean(), train[0].std()
    images = [((part - mean) / deviation).contiguous(memory_format=torch.channels_last) for part, _ in (train, test)]
    return ImageSet(images[0], train[1], images[1], test[1])
