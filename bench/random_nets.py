"""Random small nets of everything that channels flow through, for property tests: the same net for the same seed.

    net, x = random_net(seed)            # a module in eval mode and an input for it, both in float64
    prepared = fxdbsr.prepare(net, 4)
    random_masks(prepared, seed)         # random blocks, whole rows, whole columns or all of them off

A net is a list of steps (`bench.random_steps`); every kind of step is drawn with its weight in `KINDS`.
"""

from __future__ import annotations

from random import Random
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bench.random_steps import Affine, RandomNet
from fxdbsr.layers import blocked_layers

Shape: TypeAlias = tuple[int, int]  # channels, side of the square image
CHANNELS = (4, 6, 8, 12, 16)
SIDE = 6


class _Builder:
    """Draws steps; `shapes[i]` is the shape of value i. A method with a weight in `KINDS` draws one kind of step."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.layers = nn.ModuleDict()
        self.steps: list[tuple[str, list[int], dict[str, Any]]] = []
        self.shapes: list[Shape] = [(self.random.choice(CHANNELS), SIDE)]

    def step(self, kind: str, reads: list[int], channels: int, **options: Any) -> int:
        self.steps.append((kind, reads, options))
        self.shapes.append((channels, self.shapes[reads[0]][1]))
        return len(self.shapes) - 1

    def add_layer(self, module: nn.Module) -> str:
        name = f"{type(module).__name__.lower()}{len(self.layers)}"
        self.layers[name] = module
        return name

    def module(self, x: int, module: nn.Module, channels: int, kind: str = "module", **options: Any) -> int:
        return self.step(kind, [x], channels, layer=self.add_layer(module), **options)

    def new_conv(self, i: int, o: int, grouped: bool = True) -> nn.Conv2d:
        """A conv that keeps the side."""
        choice = self.random.choice
        kernel = choice((1, 1, 3))
        mode: Any = choice(("zeros", "zeros", "reflect", "circular")) if kernel == 3 else "zeros"
        padding = choice((kernel // 2, "same")) if mode == "zeros" else kernel // 2
        groups = choice([g for g in (1, 1, 1, 2, 4, i) if i % g == 0 and o % g == 0]) if grouped else 1
        return nn.Conv2d(i, o, kernel, 1, padding, 1, groups, choice((True, False)), mode)

    def any_value(self) -> tuple[int, int]:
        """(position, channels) of a value to go on from: mostly the last one."""
        x = len(self.shapes) - 1 if self.random.random() < 0.6 else self.random.randrange(len(self.shapes))
        return x, self.shapes[x][0]

    def pair(self) -> tuple[int, int, int]:
        """(position, position, channels) of two values of one shape; a conv makes one where there is none."""
        x, c = self.any_value()
        fits = [i for i, shape in enumerate(self.shapes) if shape == self.shapes[x] and i != x]
        if fits and self.random.random() < 0.7:
            return x, self.random.choice(fits), c
        return x, self.module(x, self.new_conv(c, c), c), c

    def conv(self) -> None:
        x, c = self.any_value()
        o = self.random.choice(CHANNELS)
        self.module(x, self.new_conv(c, o), o)

    def depthwise(self) -> None:
        x, c = self.any_value()
        o = c * self.random.choice((1, 2))
        self.module(x, nn.Conv2d(c, o, 3, padding=1, groups=c, bias=self.random.random() < 0.5), o)

    def transposed(self) -> None:
        x, c = self.any_value()
        groups = self.random.choice((1, 2)) if c % 2 == 0 else 1
        o = self.random.choice(CHANNELS)
        self.module(x, nn.ConvTranspose2d(c, o, 3, padding=1, groups=groups), o)

    def norm(self) -> None:
        x, c = self.any_value()
        kinds: list[Any] = [nn.BatchNorm2d, nn.BatchNorm2d, nn.InstanceNorm2d]
        if c % 2 == 0:
            kinds.append(lambda n: nn.GroupNorm(2, n))
        self.module(x, self.random.choice(kinds)(c), c)

    def activation(self) -> None:
        x, c = self.any_value()
        kinds: tuple[Any, ...] = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.Sigmoid, nn.PReLU)
        kind = self.random.choice(kinds)
        self.module(x, nn.PReLU(c) if kind is nn.PReLU else kind(), c)

    def function(self) -> None:
        x, c = self.any_value()
        names = ("relu", "relu6", "silu", "hardswish", "gelu", "elu", "tanh", "softplus")
        self.step("function", [x], c, name=self.random.choice(names))

    def pool(self) -> None:
        x, c = self.any_value()
        self.module(x, self.random.choice((nn.MaxPool2d, nn.AvgPool2d))(3, 1, 1), c)

    def pooled(self) -> None:
        x, c = self.any_value()
        o, choice = self.random.choice(CHANNELS), self.random.choice
        x = self.module(x, self.new_conv(c, o), o)
        if choice((True, False)):
            x = self.step("function", [x], o, name="relu")
        kinds: tuple[Any, ...] = (nn.MaxPool2d, nn.MaxPool2d, nn.AvgPool2d)
        stride, padding, ceil = choice((None, None, 1, (2, 1))), choice((0, 0, 1)), choice((False, False, True))
        pool = choice(kinds)(choice((2, 2, (2, 1), (1, 2))), stride, 0, ceil_mode=ceil)
        if padding and pool.kernel_size == 2:
            pool.padding = padding
        self.module(x, pool, o, "pooled", conv=self.add_layer(self.new_conv(o, o)))

    def twice(self) -> None:
        x, c = self.any_value()
        self.module(x, self.new_conv(c, c), c, "twice")

    def in_place(self) -> None:
        x, c = self.any_value()
        after = self.random.choice(("add", "relu", "mul"))
        self.module(x, self.new_conv(c, c), c, "in_place", after=after)

    def written_late(self) -> None:
        x, c = self.any_value()
        self.module(x, self.new_conv(c, c), c, "written_late")

    def binary(self) -> None:
        x, y, c = self.pair()
        self.step(self.random.choice(("add", "add", "add", "into", "multiply", "maximum")), [x, y], c)

    def cat(self) -> None:
        x, y, c = self.pair()
        self.step("cat", [x, y], 2 * c)

    def parts(self) -> None:
        x, c = self.any_value()
        if c > 1:
            first = self.random.randrange(1, c)
            self.step("split", [x], first, first=first)
        if c % 2 == 0:
            self.step("swap", [x], c)
            self.step("chunk", [x], c // 2)
            self.step("shuffle", [x], c, groups=2)

    def slices(self) -> None:
        x, c = self.any_value()
        start, step = self.random.randrange(max(c // 2, 1)), self.random.choice((1, 2))
        self.step("slice", [x], len(range(start, c, step)), start=start, step=step)
        if c > 1:
            self.step("narrow", [x], c // 2, start=start, length=c // 2)
            self.step("unbound", [x], 2)

    def gate(self) -> None:
        x, c = self.any_value()
        linear = self.random.random() < 0.5
        down, up = (nn.Linear(i, o) if linear else nn.Conv2d(i, o, 1) for i, o in ((c, 4), (4, c)))
        self.step("gate", [x], c, down=self.add_layer(down), up=self.add_layer(up), linear=linear)

    def pad_channels(self) -> None:
        x, c = self.any_value()
        before, after = self.random.choice(((0, 4), (2, 2)))
        self.step("pad_channels", [x], c + before + after, before=before, after=after)

    def last(self) -> None:
        x, c = self.any_value()
        self.module(x, self.random.choice((nn.LayerNorm(c), nn.Linear(c, c))), c, "last")

    def shift(self) -> None:
        x, c = self.any_value()
        self.step("shift", [x], c, affine=self.add_layer(Affine(c)))

    def opaque(self) -> None:
        x, c = self.any_value()
        self.step(self.random.choice(("number", "softmax")), [x], c)

    def halves(self) -> None:
        x, c = self.any_value()
        self.module(x, self.new_conv(c, c), c, "halves")

    def net(self, steps: int) -> RandomNet:
        """The net, with a linear layer behind everything that nobody has read yet."""
        for kind in self.random.choices(list(KINDS), list(KINDS.values()), k=steps):
            if self.shapes[-1][0] > 32:
                self.module(len(self.shapes) - 1, self.new_conv(self.shapes[-1][0], 8), 8)
            getattr(self, kind)()
        read = {i for _, reads, _ in self.steps for i in reads}
        last, *others = [i for i in range(len(self.shapes)) if i not in read]
        for i in others:
            last = self.step("cat", [last, i], self.shapes[last][0] + self.shapes[i][0])
        c = self.shapes[last][0]
        heads = ([nn.Flatten(), nn.Linear(c * SIDE**2, 5)], [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 5)])
        last = self.module(last, nn.Sequential(*self.random.choice(heads)), 5)
        return RandomNet(self.steps, self.layers, last)


KINDS = {
    "conv": 9, "depthwise": 2, "transposed": 1, "norm": 4, "activation": 4, "function": 2, "pool": 2, "pooled": 2,
    "twice": 1, "in_place": 1, "written_late": 1, "binary": 5, "cat": 2, "parts": 1, "slices": 1, "gate": 1,
    "pad_channels": 1, "last": 1, "shift": 1, "opaque": 1, "halves": 1,
}  # fmt: skip


@torch.no_grad()
def random_net(seed: int, steps: int = 12) -> tuple[RandomNet, Tensor]:
    """A net of about `steps` steps in eval mode, and an input `[2, C, 6, 6]`; both in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        builder = _Builder(seed)
        net = builder.net(steps).double().eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
        return net, torch.randn(2, builder.shapes[0][0], SIDE, SIDE, dtype=torch.float64)


@torch.no_grad()
def random_masks(prepared: nn.Module, seed: int) -> str:
    """Switch blocks off and draw scales; returns which: "random", "rows", "columns" or "zero"."""
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    structure = random.choice(("random", "rows", "rows", "columns", "columns", "zero"))
    keep = random.choice((0.3, 0.5, 0.7))
    for layer in blocked_layers(prepared):
        mask = torch.rand(layer.mask.shape, generator=generator) < keep
        if structure == "rows":
            mask = mask[:, :1].expand_as(mask)
        elif structure == "columns":
            mask = mask[:1].expand_as(mask)
        elif structure == "zero" and random.random() < 0.5:
            mask = torch.zeros_like(mask)
        layer.set_mask(mask.clone())
        layer.scale.uniform_(0.5, 1.5, generator=generator)
    return structure
