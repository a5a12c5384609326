"""What the device itself can do, and the questions that the resource model leaves open.

copy, gemm      ceilings of memory and of matrix units through PyTorch
launch          an empty kernel in a CUDA graph
l2              bytes from L2 to all multiprocessors
matrix          products of operands that stay in shared memory, 32 to 256 outputs wide
taps            a 3x3 layer with activations through L1 and past it
reach           which shipped tiles run on wgmma, and with how many registers
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.gpu_convs import Conv, Problem
from bench.gpu_setting import DTYPES, Case, Setting, set_precision

WIDE = Conv(256, 256, (3, 3), (1, 1), (1, 1), 1, (28, 28), False, "relu")


def copy(setting: Setting) -> dict[str, Any]:
    """Terabytes a second, read and written, of a copy of device memory."""
    source = torch.randn(16 if setting.rehearse else 1 << 29, device=setting.device)
    target = torch.empty_like(source)
    timed = setting.times({"copy": lambda: target.copy_(source)}, "copy", calls=4)
    return timed if setting.rehearse else {**timed, "TB/s": _rate(2 * source.nbytes, timed["us copy"])}


def gemm(setting: Setting) -> dict[str, Any]:
    """TFLOP/s of a square product by dtype."""
    n = 64 if setting.rehearse else 8192
    found = {}
    for dtype in DTYPES:
        set_precision(dtype)
        a, b = (torch.randn(n, n, device=setting.device).to(DTYPES[dtype]) for _ in range(2))
        timed = setting.times({dtype: partial(torch.mm, a, b)}, dtype, calls=2)
        found[dtype] = None if setting.rehearse else _rate(2 * n**3, timed[f"us {dtype}"])
    return {"TFLOP/s": found}


def launch(setting: Setting) -> dict[str, Any]:
    """Microseconds of the smallest kernel in a graph of 100."""
    x = torch.zeros(32, device=setting.device)
    return setting.times({"empty": lambda: x.add_(1)}, "empty", calls=100)


def l2(setting: Setting) -> dict[str, Any]:
    """Terabytes a second from L2, and bytes a clock and multiprocessor at the clock of the model."""
    from bench.gpu_kernels import read_all
    from fxdbsr.kernels.triton_device import device_of

    device = device_of(setting.device)
    programs = 2 if setting.rehearse else 4 * device.processors
    y = torch.zeros(programs, dtype=torch.int32, device=setting.device)
    found = {}
    for megabytes, cache in ((20, ".cg"), (20, ""), (40, ".cg")):
        steps = 2 if setting.rehearse else megabytes * 1_000_000 // 16384
        x = torch.ones(steps * 4096, dtype=torch.int32, device=setting.device)
        read = partial(read_all[(programs,)], x, y, steps, 4096, cache, num_warps=8)
        timed = setting.times({"read": read}, "read")
        if not setting.rehearse:
            rate = _rate(programs * x.nbytes, timed["us read"])
            clocks = device.processors * device.clock
            found[f"{megabytes} MB {cache}"] = {"TB/s": rate, "bytes a clock": round(rate * 1e12 / clocks, 1)}
    return found


def matrix(setting: Setting) -> dict[str, Any]:
    """TFLOP/s of 128 pixels by 32 to 256 outputs from shared memory, weights first and second."""
    from bench.gpu_kernels import multiply_all
    from fxdbsr.kernels.triton_device import device_of

    programs = 2 if setting.rehearse else 2 * device_of(setting.device).processors
    steps = 2 if setting.rehearse else 4000
    a = torch.randn(256, 64, device=setting.device).half()
    found = {}
    for rows, columns in ((128, 32), (128, 64), (128, 128), (128, 256), (64, 128), (64, 256)):
        y = torch.zeros(programs * rows * columns, device=setting.device)
        warps = 8 if rows * columns > 16384 else 4
        product = partial(multiply_all[(programs,)], a, a, y, steps, rows, columns, 64, num_warps=warps)
        timed = setting.times({"dot": product}, "dot", calls=2)
        if not setting.rehearse:
            found[f"{rows}x{columns}"] = _rate(programs * 2 * rows * columns * 64 * steps, timed["us dot"])
    return {"TFLOP/s": found}


def taps(setting: Setting) -> dict[str, Any]:
    """One wide 3x3 layer on tiles that read through L1 and on those that do not."""
    from fxdbsr.kernels.triton_tune import candidates

    set_precision("fp16")
    layer = (WIDE.small() if setting.rehearse else WIDE).layer(
        2 if setting.rehearse else 32, torch.float16, (64, 32), 0.5
    )
    problem = Problem.of(layer, setting.device)
    listed = candidates(layer, setting.device, 1)
    runs = {n: problem.in_turn(problem.sparse(**form)) for n, form in listed.items() if "splits" not in n}
    return setting.times(runs, next(iter(runs)))


def reach(setting: Setting) -> dict[str, Any]:
    """Facts of the tiles of 16 bits and tf32, compiled for sm_90 by the compiler at hand."""
    from fxdbsr.kernels.triton_offline import shipped

    if setting.rehearse:
        return {}
    found = {}
    for entry in shipped("cuda:90", ("3x3",)):
        if entry.kernel == "gather" and entry.precision in ("16", "tf32"):
            facts = entry.compile()
            found[str(entry)] = [facts.matrix, facts.registers, facts.spills, entry.faults(facts)]
    return {"tiles": found}


def _rate(work: float, microseconds: list[float]) -> float:
    return round(work / microseconds[1] / 1e6, 2)


QUESTIONS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "copy": copy,
    "gemm": gemm,
    "launch": launch,
    "l2": l2,
    "matrix": matrix,
    "taps": taps,
    "reach": reach,
}


def cases(options: Any) -> Iterator[Case]:
    """Every question."""
    for name, question in QUESTIONS.items():
        yield Case({"part": "ceilings", "question": name}, dict, question)
