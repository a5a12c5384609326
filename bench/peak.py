"""The most float32 multiplications and additions that this machine does: GFLOP/s of all of torch's threads.

    python -m bench.peak

Each thread multiplies and adds in registers alone, in code of the CPU engine's own writer, often enough at a time to
hide the latency. On a machine whose cores are shared the figure changes from minute to minute; take it beside timings.
"""

from __future__ import annotations

import time
from functools import cache

import torch

from fxdbsr.kernels import jit
from fxdbsr.kernels.cpu_program import Call, Program, Step
from fxdbsr.kernels.cpu_steps import step
from fxdbsr.kernels.llvm import Code, splat

SUMS, TURNS = 20, 100_000  # independent sums; multiplications of each in a task


@cache
def _call(threads: int) -> tuple[Call, int]:
    """The program that does one task a thread, and its FLOPs."""
    target = jit.host()
    if target is None:
        raise RuntimeError("the engine does not know this CPU")
    code, vector, sums = Code(), f"<{target.lanes} x float>", min(SUMS, target.registers - 3)
    one = splat("float 1.0", target.lanes)
    seed = code.floats("%x", 0, target.lanes, target.lanes)

    def turn(_: str, *values: str) -> list[str]:
        fma = f"llvm.fma.v{target.lanes}f32"
        return [code.call(vector, fma, (vector, v), (vector, seed), (vector, seed)) for v in values]

    for value in code.loop("turn", 0, TURNS, 1, turn, [(vector, one)] * sums):
        code.emit(f"store {vector} {value}, ptr %y, align 4")
    memory = torch.zeros(2, 16)
    loaded = jit.load(step(code, ("x", "y")), target, "step")
    steps = [Step(loaded, (memory[0].data_ptr(), memory[1].data_ptr()), threads, (memory,))]
    return Program(target, steps, threads).call([]), 2 * target.lanes * sums * TURNS * threads


def peak_gflops() -> float:
    """GFLOP/s, the best of five runs of about ten milliseconds."""
    call, flops = _call(torch.get_num_threads())
    call.run()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        call.run()
        best = min(best, time.perf_counter() - start)
    return 1e-9 * flops / best


if __name__ == "__main__":
    print(f"{peak_gflops():.1f} GFLOP/s, {torch.get_num_threads()} threads")
