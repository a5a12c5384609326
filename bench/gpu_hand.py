"""Layers worked by hand: where the planner must send each, and why; and what a GPU says of them.

A test holds the planner to the last column. Measured, every form and tile of the engine stands beside the dense convs:
is what the planner takes within 5 % of the fastest?
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.gpu_convs import Conv
from bench.gpu_layers import measure_forms
from bench.gpu_setting import DTYPES, Case, Setting, set_precision
from fxdbsr.kernels.triton_layer import Layer

BATCH = 32
SECONDS = 0.6

# Batch 32, with a bias, on the data sheet of an H200: 990 / 495 / 67 TFLOP/s (16-bit, tf32, float32), 4.8 TB/s, 132
# multiprocessors at 1.83 GHz. Dense, what was measured of cuDNN: the longer of 8.4 us (4 in a 1x1 conv that adds
# nothing) + FLOP / (0.815 peak) + 15 ns for each 64 products of a sum, and of bytes at 0.6 of the bandwidth (0.55 with
# a residual); in float32 71 us and 0.555 of the peak. Sparse, with the costs of round 8 (today's are others): 1.2 us +
# programs * (fixed + steps * step) / 132 multiprocessors, in clocks that were measured: 3550 + 946 a step of 64
# products for 128 pixels by 128 outputs, 2060 + 582 (three stages) or 1290 + 620 (two) for 64x128, 1790 + 650 for
# 128x64, 764 + 348 (two) or 1380 + 407 (four) for 64x64, 887 + 565 for 128x32; in float32 911 + 1800 a step of 32
# products for 128x32.
HAND = [
    # 7.4 GFLOP, 110 us at the peak: dense 71 + 110 / 0.555 = 270 us, as an H100 has it; half of the products are 784
    # programs of 128x32 and 18 of 36 steps: 197,800 clocks, 108 us
    ("float32 3x3", 128, 128, 3, 28, "ieee", (32, 32), 0.5, "relu", "sparse"),
    # 3.3 GFLOP, 49 us at the peak: dense 71 + 49 / 0.555 = 160 us, as an H100 has it; 392 programs of 128x32 and 16 of
    # 32 steps: 88,200 clocks, 48 us, and as long for the longest one after another
    ("float32 1x1", 1024, 256, 1, 14, "ieee", (32, 32), 0.5, "relu", "sparse"),
    # 29.6 GFLOP: dense 71 + 442 / 0.555 = 867 us, as an H100 has it; 784 programs of 128x32 and 72 of 144 steps:
    # 775,000 clocks, 424 us
    ("wide float32 3x3", 512, 512, 3, 14, "ieee", (32, 32), 0.5, "relu", "sparse"),
    # 118.4 GFLOP: dense 8.4 + 147 + 1 = 156 us; 784 programs of 128x128 and 22 of 72 steps: 143,000 clocks, 78 us
    ("tall blocks", 512, 512, 3, 28, "fp16", (128, 32), 0.3, "relu", "sparse"),
    # dense 156 us; 1,568 programs of 128x64 and 22 steps: 190,000 clocks, 104 us
    ("blocks of a tile's height", 512, 512, 3, 28, "fp16", (64, 16), 0.3, "relu", "sparse"),
    # 118.4 GFLOP: dense 156 us; 6,272 programs of 128x32 and 3.5 of 36 steps: 136,000 clocks, 74 us
    ("square blocks, few kept", 256, 256, 3, 56, "fp16", (32, 32), 0.1, "relu", "sparse"),
    # 29.6 GFLOP: dense 8.4 + 73 us; 196 programs of 128x128 and 13.5 of 144 steps of 32 products: 24,200 clocks, 13
    # us, and 15 us for the longest one after another
    ("tf32", 512, 512, 3, 14, "tf32", (128, 32), 0.1, "relu", "sparse"),
    # the conv 8.4 + 4 us, then a kernel more that moves 25.7 MB; 1,568 programs of 64x64, 0.067 clocks for each
    # exponential, and two rows that need 2.6 of 4 steps: 23,200 clocks, 12.7 us
    ("an epilogue that cuDNN does not fuse", 256, 1024, 1, 14, "fp16", (32, 32), 0.5, "silu", "sparse"),
    # 32 MB at 0.6 of the bandwidth take cuDNN 11 us; two rows need 3.5 of 8 steps: 784 programs of 64x64: 11,800
    # clocks, 6.4 us
    ("cuDNN takes long to start", 512, 128, 1, 28, "fp16", (32, 32), 0.25, "relu", "sparse"),
    # 64 MB at 0.6 of the bandwidth: dense 22 us; 3,136 programs of 64x128 and one step: 45,400 clocks, 25 us
    ("memory bound", 64, 256, 1, 56, "fp16", (32, 32), 0.75, "relu", "dense"),
    # 29 MB at 0.55 of the bandwidth 11 us, start and products 12.5 us: dense 14.5 us; 784 programs of 64x128, two
    # thirds more for the residual, and 3.1 of 4 steps: 24,100 clocks, 13 us, memory besides: 15.4 us
    ("memory bound with a residual", 256, 1024, 1, 14, "fp16", (32, 32), 0.5, "residual relu", "dense"),
    # 7.4 GFLOP: dense 8.4 + 9 + 0.3 = 18 us; four rows need 15 of 18 steps, 784 programs of 128x32: 56,400 clocks, 31
    # us
    ("small blocks", 128, 128, 3, 28, "fp16", (8, 8), 0.5, "relu", "dense"),
    # 7.4 GFLOP: dense 18 us; four rows need 30 of 36 steps: 392 programs of 64x64: 40,400 clocks, 22 us
    ("blocks of 16", 256, 256, 3, 14, "fp16", (16, 16), 0.5, "relu", "dense"),
    # dense 18 us; four rows need all columns: 196 programs of 64x128 and 36 steps, 34,200 clocks, 19 us, and 16 us for
    # the steps one after another
    ("a quarter pruned, 14x14", 256, 256, 3, 14, "fp16", (32, 32), 0.75, "relu", "dense"),
    # 29.6 GFLOP: dense 46 us; 392 programs of 128x128 and 36 steps: 111,700 clocks, 61 us
    ("a tenth pruned, 28x28", 256, 256, 3, 28, "fp16", (32, 32), 0.9, "relu", "dense"),
    # 29.6 GFLOP: dense 46 us; 196 programs of 128x128 and 68 of 72 steps: 100,800 clocks, 55 us
    ("a quarter pruned, wide", 512, 512, 3, 14, "fp16", (32, 32), 0.75, "relu", "dense"),
    # 3.3 GFLOP: dense 4 + 4.1 + 0.5 = 8.6 us; two rows need 29 of 32 steps: 200 programs of 64x64, 20,000 clocks, 11
    # us, and as long for the steps one after another
    ("a quarter pruned, 7x7", 2048, 512, 1, 7, "fp16", (32, 32), 0.75, "relu", "dense"),
]

# Measured beside them, with no verdict: other layers with exponentials, which cuDNN does not fuse.
MORE = [
    ("SiLU, wide", 256, 256, 3, 28, "fp16", (128, 32), 0.5, "silu", ""),
    ("SiLU, four rows", 512, 512, 3, 14, "fp16", (32, 32), 0.3, "silu", ""),
    ("SiLU, 1x1", 512, 512, 1, 28, "fp16", (128, 32), 0.3, "silu", ""),
    ("SiLU, short", 512, 256, 1, 14, "fp16", (32, 32), 0.5, "silu", ""),
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


def measure(row: tuple[Any, ...], setting: Setting) -> dict[str, Any]:
    """Errors first, then the times of all that are right."""
    set_precision(dtype_of(row))
    layer = layer_of(row)
    if setting.rehearse:
        layer = conv_of(row).small().layer(2, layer.dtype, row[6], row[7])
    return measure_forms(layer, replace(setting, seconds=SECONDS))


def cases(options: Any) -> Iterator[Case]:
    """All rows."""
    for row in (*HAND, *MORE):
        yield _case(row)


def _case(row: tuple[Any, ...]) -> Case:
    name, *_, way = row
    block = "x".join(map(str, row[6]))
    key = {"part": "hand", "layer": name, "of": conv_of(row).name, "dtype": dtype_of(row), "block": block}
    return Case({**key, "kept": row[7], "must go": way}, dict, lambda setting: measure(row, setting))
