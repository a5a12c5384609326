"""Random convs and random nets through every backend that is at hand, held against float64.

    python -m bench.fuzz --cases 500                             # seeds 0 to 499
    python -m bench.fuzz --seed 1234 --cases 1                   # one of them again
    python -m bench.fuzz --cases 20000 --json bench/results/fuzz.json   # goes on where it was stopped

A seed draws a conv (geometry, groups, blocks, mask, dtype, layout of the input, padding mode, bias, norm, residual,
activation) or, every fourth time, a net of `bench.random_nets` (chains, residuals, cats, splits, shared modules).
It is prepared, loses blocks, and is converted; the error against the prepared model in float64, with the same
rounded weights and inputs, may be four times eager's own in that dtype and eight units in the last place of the
largest output. New memory is filled with NaN, so that an output which nobody writes is found. A case that fails is
shrunk: the simplest case that still fails is printed with the seed. Triton's interpreter is slow, and takes part
in every `--triton-every`th case.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

if __name__ == "__main__":  # before anything imports a kernel
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxdbsr
from bench.paired import provenance
from bench.random_nets import random_masks, random_net
from fxdbsr.kernels.choice import check_available
from fxdbsr.layers import blocked_layers
from fxdbsr.nn.packed import PackedConv

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
            flat = tuple(field.default[:1]) * len(self.kernel) if isinstance(field.default, tuple) else field.default
            least = field.default if field.name in ("channels", "block") else flat
            options = [least]
            if isinstance(value, int) and not isinstance(value, bool):
                options += [value // 2, value - 1]
            if isinstance(value, tuple):
                for place, entry in enumerate(value):
                    numbers = [1, entry // 2, entry - 1] if isinstance(entry, int) else [1]
                    options += [(*value[:place], number, *value[place + 1 :]) for number in numbers]
            for option in options:
                if option != value:
                    yield replace(self, **{field.name: option})


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
        self.norm = NORMS[axes - 1](case.channels[1]) if case.norm else nn.Identity()
        if case.norm:
            nn.init.uniform_(self.norm.weight, 0.5, 1.5)
            nn.init.normal_(self.norm.bias)
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 1.5)
        self.act = ACTIVATIONS[case.activation]
        self.function = FUNCTIONS[axes - 1] if case.function else None

    def convolved(self, x: Tensor) -> Tensor:
        """The conv and its norm."""
        if self.function is None:
            y: Tensor = self.norm(self.conv(x))
            return y
        conv = self.conv
        return self.norm(
            self.function(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        )

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


Case = TypeVar("Case", ConvCase, NetCase)


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
            return min((*model(*inputs).shape[2:], 1)) >= 1
    except (RuntimeError, ValueError, NotImplementedError):
        return False


@torch.no_grad()
def failures(case: ConvCase | NetCase, backends: list[str]) -> list[str]:
    """What is wrong with each of `backends` on `case`, as sentences; none where all is well."""
    dtype = DTYPES[case.dtype]
    model, inputs = case.build()
    inputs = tuple(rounded(x, dtype) for x in inputs)
    try:
        prepared = fxdbsr.prepare(model.to(dtype), case.block)
    except ValueError as error:
        return [] if "has no layer to block" in str(error) else [f"prepare: {error}"]
    case.masked(prepared)
    eager = prepared(*inputs)
    exact = copy.deepcopy(prepared).double()(*(x.double() for x in inputs))
    if not exact.numel():
        bound = 0.0
    else:
        unit = torch.finfo(dtype).eps * exact.abs().max().item()
        bound = 4 * (eager.double() - exact).abs().max().item() + 8 * unit
    first = case.seed % len(backends)
    found = []
    converted = None
    for backend in (*backends[first:], *backends[:first]):
        try:
            if converted is None or case.seed % 10 == 0:
                converted = fxdbsr.convert(prepared, backend=backend)
            y = switched(converted, backend)(*inputs)
            if y.shape != exact.shape or y.dtype != eager.dtype:
                found.append(f"{backend}: expected {eager.dtype} {tuple(exact.shape)}, got {y.dtype} {tuple(y.shape)}")
            elif y.numel() and not (error := (y.double() - exact).abs().max().item()) <= bound:
                found.append(f"{backend}: error {error:.3g} above {bound:.3g}")
        except Exception as error:
            found.append(f"{backend}: {type(error).__name__}: {str(error)[:300]}")
    return found


def switched(converted: nn.Module, backend: str) -> nn.Module:
    """`converted` with every packed conv on `backend`, which is faster than to convert again."""
    for layer in converted.modules():
        if isinstance(layer, PackedConv) and layer.backend != backend:
            layer.backend = backend
            layer.choose_engine()
    return converted


def fails_on(case: ConvCase | NetCase, backends: list[str]) -> bool:
    """True where one of `backends` is wrong on `case`."""
    return bool(failures(case, backends))


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, lying in memory as it did."""
    if x.stride()[:1] == (0,):
        return x[:1].to(dtype).expand(x.shape)
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)


def shrink(case: Case, fails: Callable[[Case], bool]) -> Case:
    """The simplest case that still fails, found by taking the first simpler one that does until there is none."""
    for simpler in case.simpler():
        if (isinstance(simpler, NetCase) or is_valid(simpler)) and fails(simpler):
            return shrink(simpler, fails)
    return case


def at_hand() -> list[str]:
    """The backends that can run here."""
    found = []
    for backend in ("reference", "dense", "cpu", "triton"):
        try:
            check_available(backend, torch.float32, torch.device("cpu"))
        except RuntimeError:
            continue
        found.append(backend)
    return found


def takes_part(case: ConvCase | NetCase, backend: str, triton_every: int) -> bool:
    """True where `backend` runs `case`: in dtypes that it takes, Triton's interpreter now and then."""
    if backend == "cpu":
        return case.dtype in ("float32", "bfloat16")
    if backend != "triton":
        return True
    if not isinstance(case, ConvCase) or len(case.kernel) != 2 or case.dtype not in ("float32", "float16"):
        return False
    return case.seed % triton_every == 0 and case.batch * case.size[0] * case.size[1] <= 150


@dataclass
class Tally:
    """What has been run: counts of cases by kind, dtype and backend, and what failed."""

    first: int
    done: int = 0
    seconds: float = 0.0
    counts: dict[str, int] | None = None
    failed: list[dict[str, Any]] | None = None


def run(tally: Tally, cases: int, triton_every: int, save: Callable[[Tally], None]) -> None:
    """Run the seeds from `tally.first + tally.done` to `tally.first + cases`."""
    counts, tally.failed = Counter(tally.counts or {}), tally.failed or []
    backends = at_hand()
    while tally.done < cases:
        start, seed = time.perf_counter(), tally.first + tally.done
        case = draw(seed)
        chosen = [backend for backend in backends if takes_part(case, backend, triton_every)]
        counts.update([type(case).__name__, case.dtype, *chosen])
        if found := failures(case, chosen):
            least = shrink(case, partial(fails_on, backends=chosen))
            left = "; ".join(failures(least, chosen))
            print(f"seed {seed}: {'; '.join(found)}\n  {case}\n  shrunk to {least}: {left}", flush=True)
            tally.failed.append({"seed": seed, "what": found, "shrunk": repr(least)})
        tally.done += 1
        tally.seconds += time.perf_counter() - start
        tally.counts = dict(sorted(counts.items()))
        if tally.done % 100 == 0 or tally.done == cases:
            save(tally)


def main() -> int:
    """Run the cases asked for; exit 1 if one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--triton-every", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    tally = Tally(arguments.seed)
    if arguments.json and arguments.json.exists():
        tally = Tally(**json.loads(arguments.json.read_text())["tally"])

    def save(tally: Tally) -> None:
        print(f"{tally.done} cases, {len(tally.failed or [])} failed, {tally.seconds:.0f} s", flush=True)
        if arguments.json:
            text = json.dumps({"about": provenance(), "tally": asdict(tally)}, indent=1) + "\n"
            arguments.json.write_text(text)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["FXDBSR_CACHE"] = folder
        run(tally, arguments.cases, arguments.triton_every, save)
    return int(bool(tally.failed))


if __name__ == "__main__":
    sys.exit(main())
