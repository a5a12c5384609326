"""Random cases for `bench.fuzz`: convs with what may stand around them, and nets of `bench.random_nets`.

A case builds its model and inputs in float64, and knows the cases one step simpler than itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.random_nets import random_masks, random_net
from fxdbsr.layers import blocked_layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2), "sigmoid": torch.sigmoid, "gelu": F.gelu,
}  # fmt: skip
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
FUNCTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class ConvCase:
    """One conv with what may stand around it; the defaults are the simplest."""

    seed: int
    batch: int = 1
    channels: tuple[int, int] = (1, 1)
    groups: int = 1
    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    padding: Any = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    padding_mode: str = "zeros"
    size: tuple[int, ...] = (1, 1)
    block: tuple[int | None, int | None] = (1, 1)
    density: float = 1.0
    dtype: str = "float32"
    layout: str = "contiguous"
    bias: bool = False
    norm: bool = False
    residual: str = "none"
    activation: str = "none"
    function: bool = False
    transposed: bool = False

    def build(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The model in float64 and its inputs."""
        torch.manual_seed(self.seed)
        kind = Around if self.residual == "none" else AroundAndAdd
        model = kind(self).double().eval()
        shape = (self.batch, self.channels[0], *self.size)
        x = arranged(torch.randn(shape, dtype=torch.float64), self.layout)
        if self.residual == "none":
            return model, (x,)
        whole = model.convolved(x).shape
        axes = {"same": whole, "broadcast": (self.channels[1], *[1] * len(self.size))}
        return model, (x, torch.randn(axes[self.residual], dtype=torch.float64))

    def masked(self, prepared: nn.Module) -> None:
        """Switch blocks off and draw scales."""
        generator = torch.Generator().manual_seed(self.seed)
        for layer in blocked_layers(prepared):
            layer.set_mask(torch.rand(layer.mask.shape, generator=generator) < self.density)
            layer.scale.data.uniform_(0.5, 1.5, generator=generator)

    def simpler(self) -> Iterator[ConvCase]:
        """Cases one step simpler, those that leave out most first."""
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            flat: Any = (
                tuple(field.default[:1]) * len(self.kernel) if isinstance(field.default, tuple) else field.default
            )
            least: Any = field.default if field.name in ("channels", "block") else flat
            options = [least]
            if isinstance(value, int) and not isinstance(value, bool):
                options += [number for number in (value // 2, value - 1) if number >= int(least)]
            if isinstance(value, tuple):
                for place, entry in enumerate(value):
                    numbers = [1]
                    if isinstance(entry, int):
                        floor = flat[0] if isinstance(flat, tuple) and flat and isinstance(flat[0], int) else 1
                        numbers = [n for n in (1, entry // 2, entry - 1) if floor <= n < entry]
                    options += [(*value[:place], number, *value[place + 1 :]) for number in numbers]
            for option in options:
                if option != value:
                    changed: dict[str, Any] = {field.name: option}
                    yield replace(self, **changed)


class Around(nn.Module):
    """activation(norm(conv(x)))."""

    def __init__(self, case: ConvCase) -> None:
        super().__init__()
        axes = len(case.kernel)
        options: dict[str, Any] = {"groups": case.groups, "bias": case.bias, "dilation": case.dilation}
        kind: Any = (TRANSPOSED if case.transposed else CONVS)[axes - 1]
        if not case.transposed:
            options["padding_mode"] = case.padding_mode
        self.conv = kind(*case.channels, case.kernel, case.stride, case.padding, **options)
        self.norm: nn.Module = NORMS[axes - 1](case.channels[1]) if case.norm else nn.Identity()
        if isinstance(self.norm, NORMS):
            norm: Any = self.norm
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 1.5)
        self.act = ACTIVATIONS[case.activation]
        self.function = FUNCTIONS[axes - 1] if case.function else None

    def convolved(self, x: Tensor) -> Tensor:
        """The conv and its norm."""
        conv = self.conv
        if self.function is None:
            y = conv(x)
        else:
            y = self.function(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        normed: Tensor = self.norm(y)
        return normed

    def forward(self, x: Tensor) -> Tensor:
        """`[N, I, *size]` to `[N, O, *out]`."""
        return self.act(self.convolved(x))


class AroundAndAdd(Around):
    """activation(norm(conv(x)) + residual)."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        """`[N, I, *size]` to `[N, O, *out]`, which `residual` may broadcast to."""
        return self.act(self.convolved(x) + residual)


@dataclass(frozen=True)
class NetCase:
    """A net of `bench.random_nets`, up to the value `out` where that is not None."""

    seed: int
    steps: int = 1
    block: Any = (1, 1)
    dtype: str = "float32"
    out: int | None = None

    def build(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The model in float64 and its input."""
        net, x = random_net(self.seed, self.steps)
        net.out = net.out if self.out is None else self.out
        return net, (x,)

    def masked(self, prepared: nn.Module) -> None:
        """Switch blocks off and draw scales."""
        random_masks(prepared, self.seed)

    def simpler(self) -> Iterator[NetCase]:
        """Fewer steps, an earlier value, smaller blocks."""
        for steps in range(1, self.steps):
            yield replace(self, steps=steps, out=None)
        values = len(random_net(self.seed, self.steps)[0].steps) if self.out is None else self.out - 1
        for out in range(1, values + 1):
            yield replace(self, out=out)
        if self.block != (1, 1):
            yield replace(self, block=(1, 1))


def arranged(x: Tensor, layout: str) -> Tensor:
    """`x [N, C, *size]` with the same or fewer values, lying in memory as `layout` says."""
    match layout:
        case "channels last":
            last = x.dim() - 1
            return x.movedim(1, last).contiguous().movedim(last, 1)
        case "strided":
            return x.repeat_interleave(2, -1)[..., ::2]
        case "expanded":
            return x[:1].expand(x.shape)
        case "offset":
            return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    return x


def draw(seed: int) -> ConvCase | NetCase:
    """The case of that seed."""
    random = Random(seed)
    if seed % 4 == 3:
        block = random.choice([(1, 1), (2, 2), (4, 4), (8, 8), (1, None), (None, 1)])
        dtype = random.choice(["float64", "float32", "float32", "float32"])
        return NetCase(seed, random.choice([4, 8, 12, 16]), block, dtype)
    while True:
        case = draw_conv(seed, random)
        if is_valid(case):
            return case


def draw_conv(seed: int, random: Random) -> ConvCase:
    """A conv, which may be impossible."""
    pick = random.choice
    axes = pick([1, 2, 2, 2, 2, 2, 2, 2, 3])
    kernel = tuple([pick([1, 1, 3, 3, 5, 7, 2])] * axes) if pick([True, True, False]) else _each(random, axes, 4)
    transposed = pick([False] * 9 + [True])
    same = [(k - 1) // 2 for k in kernel]
    mode = pick(["zeros"] * 6 + ["reflect", "circular", "replicate"]) if not transposed else "zeros"
    groups = pick([1, 1, 1, 1, 1, 2, 3, 4])
    widths = (1, 2, 3, 4, 7, 8, 16, 20, 32, 33, 48)
    depthwise = pick([False] * 7 + [True])
    c = pick(widths) * (1 if depthwise else groups)
    channels = (c, c * pick([1, 2]) if depthwise else pick(widths) * groups)
    string = not transposed and pick([False] * 9 + [True])
    function = not transposed and mode == "zeros" and pick([False] * 4 + [True])
    sides = (1, 2, 3, 5, 7, 8, 13, 16) if axes < 3 else (1, 2, 4, 6)
    return ConvCase(
        seed,
        batch=pick([0, 1, 1, 2, 2, 3, 5]),
        channels=channels,
        groups=c if depthwise else groups,
        kernel=kernel,
        stride=(1,) * axes if string or pick([True, False]) else _each(random, axes, 3),
        padding=pick(["same", "valid"]) if string else tuple(same if pick([True, True, False]) else [1] * axes),
        dilation=(1,) * axes if pick([True, True, True, False]) else _each(random, axes, 3),
        padding_mode=mode,
        size=tuple(pick(sides) for _ in range(axes)),
        block=pick([(8, 8), (16, 16), (32, 32), (32, 8), (8, 32), (4, 4), (1, 1), (5, 3), (1, None), (None, 1)]),
        density=pick([0.0, 0.1, 0.3, 0.5, 0.5, 0.9, 1.0]),
        dtype=pick(["float32", "float32", "float32", "bfloat16", "float16", "float64"]),
        layout=pick(["contiguous", "contiguous", "channels last", "channels last", "strided", "expanded", "offset"]),
        bias=pick([True, False]),
        norm=pick([True, False]),
        residual=pick(["none", "none", "same", "broadcast"]),
        activation=pick(list(ACTIVATIONS)),
        function=function,
        transposed=transposed,
    )


def _each(random: Random, axes: int, most: int) -> tuple[int, ...]:
    return tuple(random.randint(1, most) for _ in range(axes))


def is_valid(case: ConvCase) -> bool:
    """True where torch runs the conv."""
    if min(case.channels) < 1 or case.groups < 1 or any(c % case.groups for c in case.channels):
        return False
    if min(*case.kernel, *case.stride, *case.dilation, *case.size) < 1 or case.batch < 0:
        return False
    if any(size is not None and size < 1 for size in case.block) or not 0 <= case.density <= 1:
        return False
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model, inputs = case.build()
            out = model(*inputs).shape[2:]
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return min(out) >= 1 and not onednn_is_wrong(case, out[-1])


def onednn_is_wrong(case: ConvCase, width: int) -> bool:
    """True for convs that torch's own bfloat16 gets wrong on CPUs with tile registers, with nothing to hold against.

    oneDNN returns what was never written where a step of more than one column leaves a single one (`width`), and where
    a 3-d image is one plane deep and the kernel deeper. With `torch.backends.mkldnn` off, or
    `ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16`, the same convs are right.
    """
    one_column = width == 1 and case.stride[-1] > 1
    one_plane = len(case.kernel) == 3 and case.size[0] == 1 and case.kernel[0] > 1
    return case.dtype == "bfloat16" and case.kernel[-1] > 1 and (one_column or one_plane)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, lying in memory as it did."""
    if x.stride()[:1] == (0,):
        return x[:1].to(dtype).expand(x.shape)
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)
