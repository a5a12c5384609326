"""The convs of a network, one at a time: right, then how fast.

Every distinct conv is taken with the epilogue that conversion fuses into it. Parts:

    correctness   every form and the planner's choice against float64
    layers        the planner's choice against cuDNN, its fused convs, and dense Triton; in float32 3xTF32, too
    candidates    every form and many tiles beside the dense convs: how far off the best is the planner's choice?
    tiles         many more tiles than are shipped (gpu_tiles.py)
    compile       against torch.compile (max-autotune)
    bsr           1x1 convs against torch's own block-sparse product
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench import gpu_tiles
from bench.gpu_convs import Conv, Problem, chosen, convs, estimate
from bench.gpu_setting import BLOCKS, DTYPES, Case, Setting, set_precision
from fxdbsr.kernels import triton as engine
from fxdbsr.kernels.triton_device import device_of
from fxdbsr.kernels.triton_layer import Layer
from fxdbsr.kernels.triton_roofline import choose, why_dense
from fxdbsr.kernels.triton_tune import candidates

PARTS = ("correctness", "layers", "candidates", "tiles", "compile", "bsr")
CORRECTNESS_BATCH = 2
FORMS = 2  # of which all tiles are tried
DENSE = "fused cuDNN"  # what a dense layer of a converted model runs
RACY = ("bitmask", "3xTF32")  # forms in which compilers have been known to lose a barrier


def measure(part: str, layer: Layer, setting: Setting) -> dict[str, Any]:
    """Errors first, times only where they are right."""
    if part == "correctness":
        return _correct(layer, setting)
    if part == "candidates":
        return measure_forms(layer, setting)
    if part == "tiles":
        return gpu_tiles.measure(layer, setting)
    problem = Problem.of(layer, setting.device, 2 if setting.rehearse else 0)
    sparse = problem.sparse(**chosen(layer, setting.device))
    reason = problem.why_wrong(sparse, setting.repeats)
    if reason is not None:
        return {"wrong": reason}
    arms = {"sparse": sparse, "eager": problem.eager, DENSE: problem.fused}
    if part == "layers":
        arms["dense Triton"] = problem.dense_triton()
        if layer.precision == "ieee":
            arms["3xTF32"] = problem.sparse(**chosen(replace(layer, allow_3xtf32=True), setting.device))
            reason = problem.why_wrong(arms["3xTF32"], setting.repeats)
            if reason is not None:
                return {"wrong": f"3xTF32: {reason}"}
    if part == "compile":
        backend = "eager" if setting.rehearse else "inductor"
        torch._dynamo.reset()  # after 8 convs through the same function it would run the next ones uncompiled
        mode = None if setting.rehearse else "max-autotune-no-cudagraphs"  # graphs are ours, for both sides
        arms["compiled"] = torch.compile(problem.eager, dynamic=False, backend=backend, mode=mode)
    if part == "bsr":
        arms["bsr"] = bsr(problem)
    return _tiles(layer, setting) | setting.times({name: problem.in_turn(arm) for name, arm in arms.items()}, "eager")


def _tiles(layer: Layer, setting: Setting) -> dict[str, str]:
    """Tiles of the planner's choice and of dense Triton, without which their times say little."""
    device, full = device_of(setting.device), layer.full()
    form, dense = choose(layer, device).form, choose(full, device).form
    tile, dense_tile = (gpu_tiles.name(gpu_tiles.planned(*of, device)[0]) for of in ((layer, form), (full, dense)))
    return {"tile": tile, "dense form": str(dense), "dense tile": dense_tile}


def _correct(layer: Layer, setting: Setting) -> dict[str, Any]:
    """Every form against float64, 3xTF32 too."""
    problem, found = Problem.of(layer, setting.device, 1), {}
    listed = candidates(replace(layer, allow_3xtf32=True), setting.device, 0)
    for name, form in listed.items():
        often = setting.repeats * (50 if any(word in name for word in RACY) and not setting.rehearse else 1)
        reason = problem.why_wrong(problem.sparse(**form), often)
        if reason is not None:
            found[name] = reason
    return {"wrong": found} if found else {"right": list(listed)}


def forms_of(layer: Layer, device: torch.device) -> dict[str, dict[str, Any]]:
    """Every form of the engine, and every tile of the best two, by name."""
    return candidates(layer, device, FORMS)


def measure_forms(layer: Layer, setting: Setting) -> dict[str, Any]:
    """Every form and many tiles beside the dense convs: errors first, then the times of all that are right."""
    problem = Problem.of(layer, setting.device, 2 if setting.rehearse else 0)
    runs, wrong = {DENSE: problem.fused, "dense Triton": problem.dense_triton()}, dict[str, str]()
    for name, form in forms_of(layer, setting.device).items():
        run = problem.sparse(**form)
        reason = problem.why_wrong(run, setting.repeats)
        if reason is None:
            runs[name] = run
        else:
            wrong[name] = reason
    model = device_of(setting.device)
    chosen = DENSE if why_dense(layer, model) else str(choose(layer, model).form)
    timed = setting.times({n: problem.in_turn(run) for n, run in runs.items()}, DENSE)
    found: dict[str, Any] = {"wrong": wrong} if wrong else {}
    medians = {name: timed[f"us {name}"][1] for name in runs if timed.get(f"us {name}")}
    if chosen in medians:
        best = min(medians, key=lambda name: medians[name])
        found |= {"best": best, "chosen over best": round(medians[chosen] / medians[best], 4)}
    return found | {"chosen": chosen, **timed}


def bsr(problem: Problem) -> Callable[[Tensor, Tensor | None], Any]:
    """torch's own block-sparse product on a 1x1 conv, without epilogue."""
    from torch.sparse import _triton_ops

    matrix = problem.weight.flatten(1).contiguous().to_sparse_bsr(problem.layer.grid.block_size)

    def run(x: Tensor, residual: Tensor | None) -> Any:
        columns = x.permute(0, 2, 3, 1).flatten(0, 2).t()
        if x.device.type == "cpu":  # rehearsal: its kernel has no interpreter
            return matrix.to_dense() @ columns
        start = columns.new_empty(matrix.shape[0], columns.shape[1])
        return _triton_ops.bsr_dense_addmm(start, matrix, columns, beta=0)

    return run


def cases(part: str, options: Any) -> Iterator[Case]:
    """The cases asked for, of the planner's view of each and what can be measured of it."""
    batches = (CORRECTNESS_BATCH,) if part == "correctness" else options.batch
    for model in options.model:
        settings = product(convs(model).items(), options.dtype, batches, options.block, options.sparsity)
        for (conv, count), dtype, batch, block, sparsity in settings:
            yield case(part, model, conv, count, dtype, batch, block, sparsity, options.rehearse)


def case(
    part: str, model: str, conv: Conv, count: int, dtype: str, batch: int, block: str, sparsity: int, small: bool
) -> Case:
    """One conv at one setting."""
    key = {"part": part, "model": model, "layer": conv.name, "count": count}
    key |= {"dtype": dtype, "batch": batch, "block": block, "sparsity": sparsity}
    set_precision(dtype)
    kept = 1 - sparsity / 100
    layer = conv.layer(batch, DTYPES[dtype], BLOCKS[block], kept)
    run = conv.small().layer(2, DTYPES[dtype], BLOCKS[block], kept) if small else layer
    reason = engine.why_not(layer.grid, *layer.geometry, layer.dtype, torch.device("cuda"))
    possible = reason is None and not (part == "bsr" and (conv.kernel != (1, 1) or conv.stride != (1, 1)))

    def measured(setting: Setting) -> dict[str, Any]:
        set_precision(dtype)
        return measure(part, run, setting)

    def estimated() -> dict[str, Any]:
        set_precision(dtype)
        return estimate(layer)

    return Case(key, estimated, measured if possible else None)
