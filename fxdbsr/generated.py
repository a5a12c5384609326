"""Generated images for classification: a shape filled with a texture, in clutter. Seeded, no download.

The class is the pair (shape, texture), so a net has to bind two things that it sees at different scales. Place,
size, rotation, colours and contrast vary freely; behind the object lie a smooth background, lines and smaller
objects of other classes, before it a bar. `difficulty` from 0 to 1 scales all of that, and the noise of the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fxdbsr.images import ImageSet, standardised

Field = Callable[[Tensor, Tensor], Tensor]


def _box(u: Tensor, v: Tensor, width: float, height: float) -> Tensor:
    return torch.maximum(u.abs() - width, v.abs() - height)


# Signed distance, about: negative inside. (u, v) are coordinates of the object, which fills about [-1, 1] x [-1, 1].
SHAPES: dict[str, Field] = {
    "disc": lambda u, v: torch.hypot(u, v) - 0.95,
    "square": lambda u, v: _box(u, v, 0.82, 0.82),
    "triangle": lambda u, v: torch.maximum(v - 0.75, 0.87 * u.abs() - 0.5 * v - 0.5),
    "cross": lambda u, v: torch.minimum(_box(u, v, 0.36, 1.0), _box(u, v, 1.0, 0.36)),
    "ring": lambda u, v: (torch.hypot(u, v) - 0.7).abs() - 0.3,
    "angle": lambda u, v: torch.minimum(_box(u + 0.6, v, 0.35, 0.95), _box(u, v - 0.6, 0.95, 0.35)),
    "crescent": lambda u, v: torch.maximum(torch.hypot(u, v) - 1.0, 0.75 - torch.hypot(u - 0.55, v)),
    "hourglass": lambda u, v: torch.maximum(v.abs() - 0.95, u.abs() - 0.15 - 0.75 * v.abs()),
}
# Brightness in [-1, 1]. (a, b) are coordinates in periods, turned and shifted at random.
TEXTURES: dict[str, Field] = {
    "plain": lambda a, b: torch.full_like(a, 0.7),
    "stripes": lambda a, b: torch.sin(2 * math.pi * a),
    "checks": lambda a, b: (2 * torch.sin(2 * math.pi * a) * torch.sin(2 * math.pi * b)).clamp(-1, 1),
    "dots": lambda a, b: ((torch.cos(2 * math.pi * a) + torch.cos(2 * math.pi * b)) * 1.2 - 0.9).clamp(-1, 1),
    "waves": lambda a, b: torch.sin(2 * math.pi * (a + 0.35 * torch.sin(math.pi * b))),
}
PERIOD = 5.0  # pixels of an image of 32x32
CHUNK = 1024


@lru_cache(maxsize=4)
def load_generated(
    train: int = 8000,
    test: int = 2000,
    *,
    size: int = 32,
    difficulty: float = 0.5,
    shapes: int = len(SHAPES),
    textures: int = len(TEXTURES),
    seed: int = 0,
) -> ImageSet:
    """`train` and `test` images by `generate`, kept in memory: asked for again, the same tensors come back.

    Standardised by the mean and the deviation of the training part.
    """
    options = {"size": size, "difficulty": difficulty, "shapes": shapes, "textures": textures}
    return standardised(
        generate(train, 2 * seed, **options),  # type: ignore[arg-type]
        generate(test, 2 * seed + 1, **options),  # type: ignore[arg-type]
    )


def generate(
    count: int,
    seed: int = 0,
    *,
    size: int = 32,
    difficulty: float = 0.5,
    shapes: int = len(SHAPES),
    textures: int = len(TEXTURES),
) -> tuple[Tensor, Tensor]:
    """Images `[count, 3, size, size]` float32 and labels `[count]`; the same for the same arguments.

    Args:
        count: number of images.
        seed: of everything that is drawn.
        size: height and width, at least 12.
        difficulty: from 0, a bare object near the middle, to 1.
        shapes, textures: how many of each are used; there are `shapes * textures` classes, and the label is
            `shape * textures + texture`.

    Raises:
        ValueError: an argument out of its range.
    """
    for name, value, low, high in (
        ("count", count, 1, math.inf),
        ("size", size, 12, math.inf),
        ("difficulty", difficulty, 0, 1),
        ("shapes", shapes, 1, len(SHAPES)),
        ("textures", textures, 1, len(TEXTURES)),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name}: expected a number from {low} to {high}, got {value!r}")
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(shapes * textures, (count,), generator=draw)
    images = [_images(part, size, difficulty, (shapes, textures), draw) for part in labels.split(CHUNK)]
    return torch.cat(images), labels


@dataclass(frozen=True)
class _Canvas:
    """`n` images of size x size in coordinates from -1 to 1, and what is drawn at random on them."""

    n: int
    size: int
    draw: torch.Generator

    def uniform(self, low: float, high: float) -> Tensor:
        """`[n, 1, 1]`."""
        return low + (high - low) * torch.rand(self.n, 1, 1, generator=self.draw)

    def colour(self, strength: Tensor) -> Tensor:
        """`[n, 3, 1, 1]`: a direction at random, more often bright than dark, times `strength [n, 1, 1]`."""
        direction = F.normalize(torch.randn(self.n, 3, 1, 1, generator=self.draw) + 0.7, dim=1)
        return 1.7 * strength.unsqueeze(1) * direction

    def turned(self, angle: Tensor, dx: Tensor | float = 0.0, dy: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """Coordinates `[n, size, size]` of axes moved by (dx, dy) and turned by `angle`."""
        line = torch.linspace(-1, 1, self.size)
        y, x = torch.meshgrid(line, line, indexing="ij")
        x, y = x - dx, y - dy
        return angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x

    def strip(self, width: float, reach: float) -> Tensor:
        """Coverage `[n, 1, size, size]` of a straight band."""
        u, _ = self.turned(self.uniform(0, math.pi))
        return torch.sigmoid(24 * (width - (u - self.uniform(-reach, reach)).abs())).unsqueeze(1)

    def object(self, shape: Tensor, texture: Tensor, radius: Tensor, far: float, turn: float) -> tuple[Tensor, Tensor]:
        """Coverage and brightness `[n, 1, size, size]` of one object an image, up to `far` from the middle."""
        place = self.uniform(-far, far), self.uniform(-far, far)
        u, v = self.turned(self.uniform(-turn, turn), *place)
        edge = _chosen(SHAPES, shape, u / radius, v / radius) * radius * self.size / 2  # pixels
        a, b = self.turned(self.uniform(0, 2 * math.pi), *place)
        scale = 16 / PERIOD / self.uniform(0.8, 1.25)
        brightness = _chosen(TEXTURES, texture, a * scale + self.uniform(0, 1), b * scale + self.uniform(0, 1))
        return torch.sigmoid(-3 * edge).unsqueeze(1), brightness.unsqueeze(1)


def _chosen(fields: dict[str, Field], number: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """At each image the field that `number [n]` says, of `a` and `b [n, size, size]`."""
    result = torch.empty_like(a)
    for k, field in enumerate(fields.values()):
        result[number == k] = field(a[number == k], b[number == k])
    return result


def _images(labels: Tensor, size: int, difficulty: float, classes: tuple[int, int], draw: torch.Generator) -> Tensor:
    """Painted from back to front: smooth ground, two lines, two small objects, the object, a bar; then noise."""
    canvas = _Canvas(len(labels), size, draw)
    uniform, textures = canvas.uniform, classes[1]
    clutter = min(1.0, 2 * difficulty)
    ground = torch.randn(canvas.n, 3, 4, 4, generator=draw)
    image = 0.9 * difficulty * F.interpolate(ground, size=(size, size), mode="bicubic", align_corners=True)
    for _ in range(2):
        image = torch.lerp(image, canvas.colour(uniform(-1, 1)), clutter * canvas.strip(0.05, 0.9))
    for _ in range(2):
        other = torch.randint(classes[0] * textures, (canvas.n,), generator=draw)
        radius = uniform(0.2, 0.2 + 0.3 * difficulty)
        coverage, brightness = canvas.object(other // textures, other % textures, radius, 1.0, math.pi)
        image = torch.lerp(image, brightness * canvas.colour(uniform(0.5, 1)), clutter * coverage)
    radius, far, turn = uniform(0.7 - 0.35 * difficulty, 0.75), 0.1 + 0.5 * difficulty, 0.1 + 0.6 * difficulty
    coverage, brightness = canvas.object(labels // textures, labels % textures, radius, far, turn)
    image = torch.lerp(image, brightness * canvas.colour(uniform(1 - 0.7 * difficulty, 1.1)), coverage)
    hidden = (torch.rand(canvas.n, 1, 1, 1, generator=draw) < difficulty) * canvas.strip(0.12, 0.5)
    image = torch.lerp(image, canvas.colour(uniform(-1, 1)), hidden)
    return image + 0.5 * difficulty * torch.randn(image.shape, generator=draw)
