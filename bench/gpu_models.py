"""Whole networks: converted models against cuDNN eager and torch.compile, all replayed as CUDA graphs in turns.

Arms, each on the same input, channels last:

    eager      the dense network, cuDNN choosing by measurement
    compiled   torch.compile, max-autotune: the baseline to quote; where it cannot be had, ratios are over eager
    default mode  torch.compile without options, where max-autotune could be had
    folded     the same with batch norms folded into the convs first
    dense      converted with backend="dense": our fused epilogues, no sparsity
    sparse     converted, each layer where the planner puts it
    3xTF32     for fp32: the same with float32 products from three in tf32

Blocks are switched off at random, the same share in every conv, spread evenly, or with `--masks covered` at least one
left in every row and column, so that no channel is dead and nothing is gained by cutting channels; `macs` says what
share of the dense MACs the masks leave, `macs after` what is left of it where conversion has cut dead channels. The
stem and the classifier stay dense.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch

import fxdbsr
from bench.gpu_compiled import dense_arms
from bench.gpu_convs import Conv, convs, estimate
from bench.gpu_networks import CLASSIFIERS, Exact, call_of, images, macs_left, pruned, sparse_arms
from bench.gpu_setting import BLOCKS, DTYPES, Case, Setting, set_precision
from fxdbsr.kernels.triton_device import H200
from fxdbsr.kernels.triton_roofline import floor_seconds, library_seconds
from fxdbsr.nn.packed import PackedConv


def measure(
    model: str, dtype: str, batch: int, block: tuple[int, int], sparsity: float, masks: str, setting: Setting
) -> dict[str, Any]:
    """Errors first, then all arms that are right, in turns."""
    set_precision(dtype)
    with torch.no_grad():
        x = images(model, batch, setting.rehearse).to(setting.device, DTYPES[dtype])
        prepared, one = pruned(model, block, sparsity, masks), images(model, 1, setting.rehearse)
        arms = sparse_arms(prepared, x, dtype)
        exact = Exact.of(prepared, x)
        reasons = {name: exact.why_wrong(arm, x) for name, arm in arms.items()}
        wrong = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason is not None)
        engines = Counter(m.engine for m in arms["sparse"].modules() if isinstance(m, PackedConv))
        runs, compiled_by = dense_arms(model, dtype, batch, setting)
        base = "compiled" if "compiled" in runs else "eager"
        right = {name: call_of(arm, x) for name, arm in arms.items() if reasons[name] is None}
        found = setting.times(runs | right, base, calls=1)
        return ({"wrong": wrong} if wrong else {}) | {
            "compiled by": compiled_by,
            "engines": dict(engines),
            "macs": round(macs_left(prepared, one), 4),
            "macs after": round(macs_left(fxdbsr.convert(prepared, backend="reference"), one), 4),
            **found,
        }


def estimate_network(model: str, dtype: str, batch: int, block: str, sparsity: int) -> dict[str, Any]:
    """Where layers go, and ratios of the convs alone by the model: estimated, and at the roofline on both sides.

    The base is a cuDNN conv and one pass over memory for its epilogue, as torch.compile makes of a network; fused dense
    does the epilogue in the conv.
    """
    if model not in CLASSIFIERS:
        return {}
    set_precision(dtype)
    base = ours = ideal = fused = floor = 0.0
    choices: Counter[str] = Counter()
    for conv, count in convs(model).items():
        layer = replace(conv.layer(batch, DTYPES[dtype], BLOCKS[block], 1 - sparsity / 100), pool=1)
        said, plain = estimate(layer), replace(layer, bias=False, residual=False, activation="none")
        choices[said["choice"]] += count
        moves = 3 if conv.residual else 2 if conv.activation != "none" else 0
        epilogue = H200.launch + moves * layer.output_bytes / H200.bandwidth if moves else 0.0
        base += count * (library_seconds(plain)["cuDNN conv and epilogue kernel"] + epilogue)
        ideal += count * (floor_seconds(plain.full(), layer.precision) + epilogue)
        times = said["estimated us"]
        taken = times["sparse"] if said["choice"] == "sparse" else min(times[n] for n in times if "cu" in n.lower())
        ours += count * 1e-6 * taken
        fused += count * floor_seconds(layer.full(), layer.precision)
        floor += count * floor_seconds(layer if blockable(conv) else layer.full(), layer.precision)
    return {
        "layers": dict(choices),
        "estimated over compiled, convs": round(base / ours, 3),
        "ceiling over compiled, convs": round(ideal / floor, 3),
        "ceiling over fused dense, convs": round(fused / floor, 3),
    }


def blockable(conv: Conv) -> bool:
    """True where the engine runs the conv: 32 input channels in a group and more."""
    return conv.channels // conv.groups >= 32


def cases(options: Any) -> Iterator[Case]:
    """The networks asked for."""
    for model, dtype, batch in product(options.model, options.dtype, options.batch):
        for masks, block, sparsity in product(options.masks, options.block, options.sparsity):
            key = {"part": "models", "model": model, "dtype": dtype, "batch": batch, "block": block}
            yield _case({**key, "sparsity": sparsity, "masks": masks}, options.rehearse)


def _case(key: dict[str, Any], rehearse: bool) -> Case:
    model, dtype, batch, block, sparsity = (key[name] for name in ("model", "dtype", "batch", "block", "sparsity"))
    run, size = ("tiny", 2) if rehearse else (model, batch)
    return Case(
        key,
        lambda: estimate_network(model, dtype, batch, block, sparsity),
        lambda setting: measure(run, dtype, size, BLOCKS[block], sparsity / 100, key["masks"], setting),
    )
