"""Layers worked by hand: where the planner must send each, and why; and what a GPU says of them.

A test holds the planner to the last column. Measured, every form and tile of the engine stands beside the dense convs:
is what the planner takes within 5 % of the fastest?
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from bench.gpu_convs import Conv, Problem
from bench.gpu_setting import DTYPES, Case, Setting, set_precision
from fxdbsr.kernels.triton_device import device_of
from fxdbsr.kernels.triton_layer import Layer
from fxdbsr.kernels.triton_roofline import choose, why_dense
from fxdbsr.kernels.triton_tune import candidates

BATCH = 32
FORMS = 2  # of which all tiles are tried
SECONDS = 0.6
DENSE = "fused cuDNN"  # what a dense layer of a converted model runs

# Batch 32, with a bias, on the data sheet of an H200: 990 / 495 / 67 TFLOP/s (16-bit, tf32, float32), 4.8 TB/s, 132
# multiprocessors at 1.83 GHz. Dense: what was measured of cuDNN, 6.8 us + FLOP / (0.83 peak) + 44 ns for each 64
# products of a sum; in float32 71 us and 0.555 of the peak. Sparse: 1 us + programs * (fixed + steps * step) / 132
# multiprocessors, in clocks that were measured: 3690 + 1004 a step of 64 products for 128 pixels by 128 outputs, 1850 +
# 537 for 64x128, 1690 + 878 for 128x64, 835 + 425 for 64x64, 872 + 746 for 128x32; in float32 1070 + 1700 a step of 32
# products for 128x32, which is 0.6 of the peak.
HAND = [
    # 7.4 GFLOP, 110 us at the peak: dense 181 us even there; half of the products at half of the peak 110 us
    ("float32 3x3", 128, 128, 3, 28, "ieee", (32, 32), 0.5, "relu", "sparse"),
    # 3.3 GFLOP, 49 us at the peak: dense 120 us even there; half of the products at half of the peak 49 us
    ("float32 1x1", 1024, 256, 1, 14, "ieee", (32, 32), 0.5, "relu", "sparse"),
    # 29.6 GFLOP: dense 71 + 442 / 0.555 = 867 us; half of the products at half of the peak 442 us
    ("wide float32 3x3", 512, 512, 3, 14, "ieee", (32, 32), 0.5, "relu", "sparse"),
    # 118.4 GFLOP: dense 6.8 + 144 + 3 = 154 us; 784 programs of 128x128 and 22 of 72 steps: 154,000 clocks, 84 us
    ("tall blocks", 512, 512, 3, 28, "fp16", (128, 32), 0.3, "relu", "sparse"),
    # dense 154 us; 1,568 programs of 128x64 and 22 steps: 250,000 clocks, 136 us
    ("blocks of a tile's height", 512, 512, 3, 28, "fp16", (64, 16), 0.3, "relu", "sparse"),
    # 118.4 GFLOP: dense 153 us; two rows need 19 % of the columns: 3,136 programs of 128x64 and 7 of 36 steps: 102 us
    ("square blocks, few kept", 256, 256, 3, 56, "fp16", (32, 32), 0.1, "relu", "sparse"),
    # 29.6 GFLOP: dense 72 + 6.8 us; 196 programs of 128x128 and 15 of 144 steps of 32 products: 28,000 clocks, 15 us
    ("tf32", 512, 512, 3, 14, "tf32", (128, 32), 0.1, "relu", "sparse"),
    # the conv 6.8 + 4 us, then a kernel more and 25.7 MB; 392 programs of 128x128 and, unpruned, 4 steps: 12.5 us
    ("an epilogue that cuDNN does not fuse", 256, 1024, 1, 14, "fp16", (32, 32), 0.5, "silu", "sparse"),
    # 32 MB take either side 6.7 us, to which cuDNN adds 6.8; 196 programs of 128x128 and 8 steps: 17,400 clocks, 9.5 us
    ("cuDNN takes long to start", 512, 128, 1, 28, "fp16", (32, 32), 0.25, "relu", "sparse"),
    # 64 MB: dense 6.8 + 16 = 23 us; 1,568 programs of 128x128 and one step: 55,800 clocks, 30 us
    ("memory bound", 64, 256, 1, 56, "fp16", (32, 32), 0.75, "relu", "dense"),
    # 29 MB: dense 6.8 + 7.3 = 14.1 us; 392 programs of 6790, for the residual, and 4 steps: 32,100 clocks, 17.5 us
    ("memory bound with a residual", 256, 1024, 1, 14, "fp16", (32, 32), 0.5, "residual relu", "dense"),
    # 7.4 GFLOP: dense 6.8 + 9 + 0.8 = 16.6 us; four rows need 17 of 18 steps, 784 programs of 128x32: 44 us
    ("small blocks", 128, 128, 3, 28, "fp16", (8, 8), 0.5, "relu", "dense"),
    # 7.4 GFLOP: dense 17.4 us; four rows need 34 of 36 steps: 392 programs of 64x64: 45,400 clocks, 25 us
    ("blocks of 16", 256, 256, 3, 14, "fp16", (16, 16), 0.5, "relu", "dense"),
    # dense 17.4 us; four rows need all columns: 196 programs of 64x128 and 36 steps, 31,500 clocks, and as long for the
    # steps one after another, 31,000: 20 us
    ("a quarter pruned, 14x14", 256, 256, 3, 14, "fp16", (32, 32), 0.75, "relu", "dense"),
    # 29.6 GFLOP: dense 44 us; 392 programs of 128x128 and 36 steps: 118,000 clocks, 65 us
    ("a tenth pruned, 28x28", 256, 256, 3, 28, "fp16", (32, 32), 0.9, "relu", "dense"),
    # 29.6 GFLOP: dense 46 us; 196 programs of 128x128 and 72 steps: 113,000 clocks, 62 us
    ("a quarter pruned, wide", 512, 512, 3, 14, "fp16", (32, 32), 0.75, "relu", "dense"),
    # 3.3 GFLOP: dense 6.8 + 4 + 1.4 = 12.2 us; two rows need 30 of 32 steps, one after another 29,900 clocks: 16 us
    ("a quarter pruned, 7x7", 2048, 512, 1, 7, "fp16", (32, 32), 0.75, "relu", "dense"),
]


def conv_of(row: tuple[Any, ...]) -> Conv:
    """The conv of a row; it keeps its input's size."""
    _, channels, outputs, kernel, size, _, _, _, epilogue, _ = row
    half = kernel // 2
    geometry = ((kernel, kernel), (1, 1), (half, half), 1, (size, size))
    return Conv(channels, outputs, *geometry, "residual" in epilogue, epilogue.split()[-1])


def dtype_of(row: tuple[Any, ...]) -> str:
    """Its precision as a dtype of the bench."""
    precision: str = row[5]
    return "fp32" if precision == "ieee" else precision


def layer_of(row: tuple[Any, ...]) -> Layer:
    """The row as the planner sees it; its float32 switches must be set."""
    return conv_of(row).layer(BATCH, DTYPES[dtype_of(row)], row[6], row[7])


def forms_of(layer: Layer, device: torch.device) -> dict[str, dict[str, Any]]:
    """Every form of the engine that is tried on the layer, by name."""
    return candidates(layer, device, FORMS)


def measure(row: tuple[Any, ...], setting: Setting) -> dict[str, Any]:
    """Errors first, then the times of all that are right."""
    set_precision(dtype_of(row))
    layer = layer_of(row)
    if setting.rehearse:
        layer = conv_of(row).small().layer(2, layer.dtype, row[6], row[7])
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
    timed = replace(setting, seconds=SECONDS).times({n: problem.in_turn(run) for n, run in runs.items()}, DENSE)
    found: dict[str, Any] = {"wrong": wrong} if wrong else {}
    medians = {name: timed[f"us {name}"][1] for name in runs if timed.get(f"us {name}")}
    if chosen in medians:
        best = min(medians, key=lambda name: medians[name])
        found |= {"best": best, "chosen over best": round(medians[chosen] / medians[best], 4)}
    return found | {"chosen": chosen, **timed}


def cases(options: Any) -> Iterator[Case]:
    """All rows."""
    for row in HAND:
        yield _case(row)


def _case(row: tuple[Any, ...]) -> Case:
    name, *_, way = row
    block = "x".join(map(str, row[6]))
    key = {"part": "hand", "layer": name, "of": conv_of(row).name, "dtype": dtype_of(row), "block": block}
    return Case({**key, "kept": row[7], "must go": way}, dict, lambda setting: measure(row, setting))
