"""A run of bench/accuracy.py as a `Setting`, and the images that it trains on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from fxdbsr.digits import load_digits
from fxdbsr.generated import load_generated
from fxdbsr.images import ImageSet

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        arm: a key of `bench.accuracy_arms.ARMS`.
        seed: of the initial weights and the order of batches.
        sparsity: fraction of the blocked convs' MACs that shall be zero; None for arms that take gamma, or none.
        gamma: strength of the penalty.
        data: a key of `CLASSES`; `draw` is the seed of the generated images: 0 to report, others to tune.
        net: "resnet" or "vgg"; `width` channels in its first stage, `depth` blocks a stage.
        block: (out, in) channels of a block.
        begin, end: fractions of the steps between which blocks go; one-shot pruning takes `end` alone.
        power: the score of a block is divided by this power of the MACs of one of its weights.
        options: of leads (`bench/accuracy_leads.py`), as sorted pairs.
    """

    arm: str
    seed: int
    sparsity: float | None = None
    gamma: float | None = None
    data: str = "generated"
    draw: int = 0
    net: str = "resnet"
    width: int = 32
    depth: int = 1
    block: tuple[int, int] = (4, 4)
    epochs: int = 12
    batch: int = 128
    lr: float = 0.4
    weight_decay: float = 1e-3
    begin: float = 0.1
    end: float = 0.67
    power: float = 0.5
    options: tuple[tuple[str, Any], ...] = ()

    def option(self, name: str, default: Any) -> Any:
        """An option of a lead, or its default."""
        return dict(self.options).get(name, default)


CLASSES = {"generated": 24, "digits": 10, "source": 40, "shapes": 8, "textures": 5}


@lru_cache(maxsize=2)
def load(data: str, draw: int = 0) -> ImageSet:
    """The images on the device.

    "generated": 8,000 of 24 classes to train on and 10,000 to test. "source": as many of all 40 pairs of shapes and
    textures; "shapes" and "textures": 2,000 others and 4,000 to test, of which that half of the pair is asked.
    "digits": scikit-learn's.
    """
    if data == "digits":
        found: Any = load_digits()
    elif data == "generated":
        found = load_generated(8000, 10000, size=24, difficulty=0.4, shapes=6, textures=4, seed=draw)
    else:
        found = _of_pairs(data, draw)
    parts = found.train_images, found.train_labels, found.test_images, found.test_labels
    return ImageSet(*(part.to(DEVICE) for part in parts))


def _of_pairs(data: str, draw: int) -> ImageSet:
    if data == "source":
        return load_generated(8000, 10000, size=24, difficulty=0.4, seed=50 + draw)
    pairs = load_generated(2000, 4000, size=24, difficulty=0.4, seed=60 + draw)
    labels = [
        label // CLASSES["textures"] if data == "shapes" else label % CLASSES["textures"]
        for label in (pairs.train_labels, pairs.test_labels)
    ]
    return ImageSet(pairs.train_images, labels[0], pairs.test_images, labels[1])
