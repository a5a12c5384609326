"""Random convs and random nets through every backend that is at hand, held against float64.

    python -m bench.fuzz --cases 500                    # seeds 0 to 499
    python -m bench.fuzz --seed 1234 --cases 1          # one of them again
    python -m bench.fuzz --cases 20000 --json bench/results/fuzz.jsonl   # goes on where it was stopped

A seed draws a conv (geometry, groups, blocks, mask, dtype, layout of the input, padding mode, bias, norm, residual,
activation) or, every fourth time, a net of `bench.random_nets` (chains, residuals, cats, splits, shared modules).
It is prepared, loses blocks, and is converted. The error against the prepared model in float64, with the same
rounded weights and inputs, may be four times eager's own in that dtype and eight units in the last place of the
largest output; where that is not enough (eager may be exact by chance, and sums long), four times eager's own with
what its layers read channels last, and 16 times what the output moves when every weight, input and value on the way
moves by a unit in the last place, the most of four draws. New memory is filled with NaN, so that an output which
nobody writes is found. A case that fails is shrunk: the simplest case that still fails is printed with the seed.
Triton's interpreter is slow, and takes part in every `--triton-every`th case, without tf32; every eighth runs on two
threads, and in every tenth each backend converts for itself, where else layers change their engine.

With `--json`, every 250 seeds are a line of that file; several processes may share it (`--part 1/2`, `--part 2/2`).
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import gc
import json
import math
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before anything imports a kernel
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch import Tensor, fx, nn

import fxdbsr
from bench.fuzz_cases import DTYPES, ConvCase, NetCase, draw, is_valid, rounded
from fxdbsr.kernels.choice import check_available
from fxdbsr.kernels.ops import channels_last
from fxdbsr.nn.packed import PackedConv
from fxdbsr.paired import provenance

PART = 250  # seeds of a line in the results
DRAWS = 4  # of how far rounding may move an output


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
    eager: Tensor = prepared(*inputs)
    first = case.seed % len(backends)
    found, outputs = [], dict[str, Tensor]()
    converted: nn.Module | None = None
    for backend in (*backends[first:], *backends[:first]):
        try:
            if converted is None or case.seed % 10 == 0:
                converted = fxdbsr.convert(prepared, backend=backend)
            outputs[backend] = switched(converted, backend)(*inputs)
        except Exception as error:
            found.append(f"{backend}: {type(error).__name__}: {str(error)[:300]}")
    doubles = tuple(x.double() for x in inputs)
    exact = prepared.double()(*doubles)
    unit = torch.finfo(dtype).eps
    bound = 4 * largest(eager.double() - exact) + 8 * unit * largest(exact)
    wrong = [backend for backend, y in outputs.items() if not largest_difference(y, exact) <= bound]
    if wrong:  # torch's norms are less exact on channels last, which packed convs give
        again: Tensor = Changed(copy.deepcopy(prepared).to(dtype), images_last, for_layers).run(*inputs)
        bound = max(bound, 4 * largest(again.double() - exact))
        draws = range(DRAWS * case.seed, DRAWS * case.seed + DRAWS)
        bound += 16 * max(largest(moved(copy.deepcopy(prepared), doubles, unit, draw) - exact) for draw in draws)
    for backend, y in outputs.items():
        if y.shape != eager.shape or y.dtype != dtype:
            found.append(f"{backend}: expected {dtype} {tuple(eager.shape)}, got {y.dtype} {tuple(y.shape)}")
        elif not (off := largest_difference(y, exact)) <= bound:
            found.append(f"{backend}: error {off:.3g} above {bound:.3g}")
    return found


def largest_difference(y: Tensor, exact: Tensor) -> float:
    """The error of `y`, infinite where it has another shape."""
    return largest(y.double() - exact) if y.shape == exact.shape else math.inf


def moved(model: nn.Module, inputs: tuple[Tensor, ...], unit: float, seed: int) -> Tensor:
    """The output of `model` where weights, inputs and all values on the way are off by a unit in the last place or so.

    A conversion rounds where eager is exact, say in the difference of two equal branches, and a norm of what hardly
    varies makes much of that.
    """
    generator = torch.Generator().manual_seed(seed)

    def off(x: Tensor) -> Tensor:
        return x * (1 + unit * torch.randn(x.shape, generator=generator, dtype=x.dtype))

    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(off(tensor))
    output: Tensor = Changed(model, off).run(*inputs)
    return output


class Changed(fx.Interpreter):
    """Runs a model with `change` applied to the floating-point tensors that are given or made by the nodes `which`."""

    def __init__(
        self, model: nn.Module, change: Callable[[Tensor], Tensor], which: Callable[[fx.Node], bool] = lambda n: True
    ) -> None:
        assert isinstance(model, fx.GraphModule)
        super().__init__(model, garbage_collect_values=False)
        self.change, self.which = change, which

    def run_node(self, n: fx.Node) -> Any:
        """What the node gives, changed; what it has written in place stays the same tensor."""
        found = super().run_node(n)
        if n.op == "output" or not isinstance(found, Tensor) or not found.is_floating_point() or not self.which(n):
            return found
        held = {t.data_ptr() for t in map(self.env.get, n.all_input_nodes) if isinstance(t, Tensor)}
        return found if found.data_ptr() in held else self.change(found)


def images_last(x: Tensor) -> Tensor:
    """`x` channels last where it holds images."""
    return channels_last(x) if x.dim() > 2 else x


def for_layers(n: fx.Node) -> bool:
    """Layers alone read `n`: no view, which may need its layout."""
    return all(user.op == "call_module" for user in n.users)


def largest(x: Tensor) -> float:
    """The largest magnitude in `x`, NaN if there is one."""
    return x.abs().max().item() if x.numel() else 0.0


def switched(converted: nn.Module, backend: str) -> nn.Module:
    """`converted` with every packed conv on `backend`, which is faster than to convert again."""
    for layer in converted.modules():
        if isinstance(layer, PackedConv) and layer.backend != backend:
            layer.backend = backend
            layer.choose_engine()
    return converted


def shrink(case: ConvCase | NetCase, fails: Callable[[ConvCase | NetCase], bool]) -> ConvCase | NetCase:
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


def run(first: int, cases: int, triton_every: int = 20) -> dict[str, Any]:
    """Run the seeds from `first` on: what failed, how many of each sort there were, the time taken."""
    counts, failed, start = Counter[str](), list[dict[str, Any]](), time.perf_counter()
    backends = at_hand()
    for seed in range(first, first + cases):
        torch.set_num_threads(1 + (seed % 8 == 0))
        case = draw(seed)
        chosen = [backend for backend in backends if takes_part(case, backend, triton_every)]
        counts.update([type(case).__name__, case.dtype, *chosen])
        if found := failures(case, chosen):
            least = shrink(case, lambda simpler, chosen=chosen: bool(failures(simpler, chosen)))  # type: ignore[misc]
            left = "; ".join(failures(least, chosen))
            print(f"seed {seed}: {'; '.join(found)}\n  {case}\n  shrunk to {least}: {left}", flush=True)
            failed.append({"seed": seed, "what": found, "shrunk": repr(least)})
    seconds = round(time.perf_counter() - start, 1)
    return {
        "first": first,
        "cases": cases,
        "failed": failed,
        "counts": dict(sorted(counts.items())),
        "seconds": seconds,
    }


def lines(path: Path | None) -> list[dict[str, Any]]:
    """The parts that are done already."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def main() -> int:
    """Run the cases asked for; exit 1 if one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--triton-every", type=int, default=20)
    parser.add_argument("--part", default="1/1", help="i/n: the i-th of n processes that share the work")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # the Triton engine follows it
    gc.freeze()
    number, parts = map(int, arguments.part.split("/"))
    end, done = arguments.seed + arguments.cases, lines(arguments.json)
    known = {(line["first"], line["cases"]) for line in done}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FXDBSR_CACHE"] = folder
        for first in range(arguments.seed + PART * (number - 1), end, PART * parts):
            size = min(PART, end - first)
            if (first, size) in known:
                continue
            done.append(run(first, size, arguments.triton_every))
            print({key: done[-1][key] for key in ("first", "cases", "seconds")}, len(done[-1]["failed"]), flush=True)
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(done[-1] | {"about": provenance()}) + "\n")
    failed = [case for line in done for case in line["failed"]]
    print(f"{sum(line['cases'] for line in done)} cases, {len(failed)} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
