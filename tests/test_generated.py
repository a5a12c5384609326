"""The generated images: seeded, balanced, harder where asked, and refused arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxdbsr.generated import CHUNK, SHAPES, TEXTURES, generate, load_generated


def test_a_seed_gives_the_same_images_again_and_another_seed_gives_others() -> None:
    images, labels = generate(50, 3)
    again, same = generate(50, 3)
    other, _ = generate(50, 4)
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    assert not torch.equal(images, other)


def test_the_classes_are_the_pairs_of_shape_and_texture() -> None:
    _, labels = generate(4000, 0, size=12)
    counts = torch.bincount(labels)
    assert len(counts) == len(SHAPES) * len(TEXTURES)
    assert counts.min() > 50
    assert int(generate(200, 0, size=12, shapes=2, textures=3)[1].max()) == 5


def test_the_parts_have_no_image_in_common_and_are_standardised() -> None:
    data = load_generated(300, 100, seed=1)
    assert data.train_images.shape == (300, 3, 32, 32)
    assert data.train_images.mean().abs() < 1e-4
    assert float(data.train_images.std()) == pytest.approx(1, abs=1e-4)
    train = {image.numpy().tobytes() for image in data.train_images}
    assert not any(image.numpy().tobytes() in train for image in data.test_images)
    assert load_generated(300, 100, seed=1) is data


def test_an_easy_image_is_its_object_on_an_empty_ground() -> None:
    images, labels = generate(200, 0, difficulty=0.0)
    corner = images[:, :, :2, :2].abs().amax((1, 2, 3))
    assert float(corner.median()) < 0.05
    discs = images[labels == 0]
    assert bool((discs[:, :, 12:20, 12:20].abs().amax((1, 2, 3)) > 0.3).all())


def test_difficulty_adds_clutter() -> None:
    corners = [generate(200, 0, difficulty=d)[0][:, :, :4, :4].std() for d in (0.0, 0.5, 1.0)]
    assert corners[0] < corners[1] < corners[2]


def test_more_images_than_a_chunk_are_finite() -> None:
    images, labels = generate(CHUNK + 5, 0, size=12)
    assert images.shape == (CHUNK + 5, 3, 12, 12)
    assert len(labels) == CHUNK + 5
    assert bool(images.isfinite().all())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"count": 0}, "count"),
        ({"size": 8}, "size"),
        ({"difficulty": 1.5}, "difficulty"),
        ({"shapes": 9}, "shapes: expected a number from 1 to 8, got 9"),
        ({"textures": 0}, "textures"),
    ],
)
def test_arguments_out_of_range_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        generate(**({"count": 2} | options))
