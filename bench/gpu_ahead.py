"""Compile the kernels of a run ahead of it, in as many processes as there are cores, into Triton's cache on disk.

    python -m bench.gpu_ahead --cache DIR [--gpu H100] [options of bench.gpu]

A launch with tensors on the meta device compiles and does not run. The workers touch no GPU, so that a machine without
one can do it: with the same versions of Python and Triton as the machine that has it, and DIR carried to the same place
there, which TRITON_CACHE_DIR names. Only what a launch reads is kept.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench import gpu_hazards, gpu_tiles
from bench.gpu_ahead_network import compile_network
from bench.gpu_convs import Conv, Problem, chosen, convs
from bench.gpu_hand import HAND, MORE, dtype_of, layer_of
from bench.gpu_layers import CORRECTNESS_BATCH, PARTS, forms_of
from bench.gpu_networks import CLASSIFIERS
from bench.gpu_setting import BLOCKS, DTYPES, set_precision
from fxdbsr.kernels import triton_device
from fxdbsr.kernels.triton_layer import Layer
from fxdbsr.kernels.triton_tune import Candidate, candidates

Job = Callable[[], str | None]  # compiles; what went wrong, or None


class NoDriver:
    """Stands in for the driver of a GPU of that capability."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def only_compile(capability: int, gpu: str = "H200") -> None:
    """From now on every launch in this process compiles its kernel for that GPU and does not run it."""
    import triton

    triton_device.H200 = getattr(triton_device, gpu)  # what the planner takes to be there
    triton.runtime.driver.set_active(NoDriver(capability))
    launch = triton.runtime.JITFunction.run

    def compile(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, warmup=True, **options)

    triton.runtime.JITFunction.run = compile


def jobs(options: argparse.Namespace) -> list[Job]:
    """What the cases that the options of bench.gpu ask for launch, in the order in which they come."""
    found: list[Job] = []
    for part in options.part:
        if part in PARTS:
            found += _jobs_of_convs(part, options)
        elif part == "models":
            which = product(options.model, options.dtype, options.batch, options.masks, options.block, options.sparsity)
            for model, dtype, batch, masks, block, sparsity in which:
                found.append(partial(compile_network, model, dtype, batch, block, sparsity, masks))
        elif part == "hand":
            found += [partial(compile_hand, row) for row in (*HAND, *MORE)]
        elif part == "hazards":
            pairs = product(gpu_hazards.CONVS, options.dtype)
            found += [partial(compile_repeats, name, dtype) for name, dtype in pairs]
    return found


def _jobs_of_convs(part: str, options: argparse.Namespace) -> Iterable[Job]:
    batch = CORRECTNESS_BATCH if part == "correctness" else options.batch[0]
    for model in (m for m in options.model if m in CLASSIFIERS):
        wide = [conv for conv in convs(model) if conv.channels // conv.groups >= 32]
        for conv, dtype, block, sparsity in product(wide, options.dtype, options.block, options.sparsity):
            yield partial(compile_conv, part, conv, dtype, batch, block, sparsity)


def compile_job(job: Job) -> str | None:
    """Run the job in a worker, on one thread."""
    torch.set_num_threads(1)
    return job()


def compile_conv(part: str, conv: Conv, dtype: str, batch: int, block: str, sparsity: int) -> str | None:
    """Compile the kernels that a part of the bench runs for one conv."""
    set_precision(dtype)
    layer = conv.layer(batch, DTYPES[dtype], BLOCKS[block], 1 - sparsity / 100)
    if part == "tiles":
        problem = Problem.of(replace(layer, batch=1), torch.device("cpu"), 1)
        return "; ".join(gpu_tiles.compile_all(problem, batch, "cuda:90")) or None
    compiled = compile_beside_dense if part in ("layers", "candidates") else compile_forms
    return compiled(layer, kernels_of(part, layer))


def compile_hand(row: tuple[Any, ...]) -> str | None:
    """Compile every form of a layer worked by hand, and that of all its blocks."""
    set_precision(dtype_of(row))
    layer = layer_of(row)
    return compile_beside_dense(layer, kernels_of("candidates", layer))


def compile_repeats(name: str, dtype: str) -> str | None:
    """Compile every form that part "hazards" repeats."""
    set_precision(dtype)
    layer = gpu_hazards.repeated_layer(name, dtype)
    return compile_forms(layer, gpu_hazards.repeated_forms(layer, torch.device("cpu")))


def kernels_of(part: str, layer: Layer) -> dict[str, Candidate]:
    """The forms in which a part of the bench runs the layer, by name."""
    cpu = torch.device("cpu")
    if part == "correctness":
        return candidates(replace(layer, allow_3xtf32=True), cpu, 0)
    if part == "candidates":
        return forms_of(layer, cpu)
    found = {"chosen": chosen(layer, cpu)}
    if part == "layers" and layer.precision == "ieee":
        found["3xTF32"] = chosen(replace(layer, allow_3xtf32=True), cpu)
    return found


def compile_beside_dense(layer: Layer, forms: dict[str, Candidate]) -> str | None:
    """Compile those forms for the layer, and that of all its blocks; what went wrong, or None."""
    full = layer.full()
    dense = compile_forms(full, {"dense Triton": chosen(full, torch.device("cpu"))})
    return "; ".join(filter(None, (dense, compile_forms(layer, forms)))) or None


def compile_forms(layer: Layer, forms: dict[str, Candidate]) -> str | None:
    """Compile those forms for the layer; what went wrong, or None."""
    problem = Problem.of(replace(layer, batch=1), torch.device("cpu"), 1)
    failed = []
    for name, form in forms.items():
        try:
            compile_form(problem, layer.batch, form)
        except Exception as error:
            failed.append(f"{layer.grid} {layer.dtype} {name}: {type(error).__name__}: {error}")
    return "; ".join(failed) or None


def compile_form(problem: Problem, batch: int, form: Candidate) -> None:
    """Compile the kernel of one form for `batch` images."""
    x, residual = (None if t is None else t.to("meta").repeat(batch, 1, 1, 1) for t in problem.inputs[0])
    assert x is not None
    run = problem.sparse(on=torch.device("meta"), **form)
    run(x.contiguous(memory_format=torch.channels_last), residual)


def compile_ahead(jobs: Sequence[Job], capability: int, seconds: float, gpu: str = "H200") -> list[str]:
    """Compile for at most about that long; sentences on what failed."""
    stop = time.monotonic() + seconds
    context = get_context("spawn")
    failed: list[str] = []
    workers = max(1, min(len(jobs), os.cpu_count() or 1))
    pool = ProcessPoolExecutor(workers, context, initializer=only_compile, initargs=(capability, gpu))
    try:
        for found in pool.map(compile_job, jobs, timeout=max(1.0, stop - time.monotonic())):
            failed += [found] if found else []
    except TimeoutError:
        failed.append(f"compiling ahead stopped after {seconds:.0f} s; the rest is compiled when it is met")
    except BrokenProcessPool as error:  # a compiler that crashes takes its process along
        failed.append(f"compiling ahead broke off: {error}; the rest is compiled when it is met")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return failed


def keep_what_a_launch_reads(cache: Path) -> int:
    """Delete the intermediate forms of the kernels in a cache; the number of kernels."""
    for path in cache.glob("*/*"):
        if path.suffix not in (".cubin", ".json"):
            path.unlink()
    return len([*cache.glob("*/*.cubin")])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile what `bench.gpu` would run with the same options."""
    from bench import gpu

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR")
    parser.add_argument("--gpu", choices=("H100", "H200"), default="H100")
    own, rest = parser.parse_known_args(arguments)
    options = gpu.parse(rest)
    os.environ["TRITON_CACHE_DIR"] = str(own.cache.absolute())
    failed = compile_ahead(jobs(options), 90, options.ahead, own.gpu)
    print(*failed, sep="\n", end="\n" if failed else "")
    print(f"{keep_what_a_launch_reads(own.cache)} kernels in {own.cache}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
