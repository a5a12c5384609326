"""What the planner's choices cost over the best ones that were measured, layer by layer (16 bits, batch 32, an H100).

    python -m bench.gpu_regret

From `gpu_rounds.jsonl` and `gpu_tiles.jsonl`: of every conv the time of the form and tile that the planner takes today,
or of the faster of cuDNN's convs where it stays dense, beside the least of all. Tiles that were not measured in a form
count as the best of that form that was.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from tabulate import tabulate

from bench.gpu_convs import convs_alone
from bench.gpu_setting import BLOCKS, set_precision
from bench.gpu_tiles import name
from bench.tables_text import RESULTS
from fxdbsr.kernels.triton_device import H100
from fxdbsr.kernels.triton_forms import Form, work
from fxdbsr.kernels.triton_layer import Layer
from fxdbsr.kernels.triton_plan import choose_tile
from fxdbsr.kernels.triton_roofline import choose, why_dense

Case = tuple[str, str, str, int]  # model, layer, block, sparsity
LIBRARY = ("eager", "fused cuDNN")


def times() -> dict[Case, dict[tuple[int, str], float]]:
    """Microseconds of each conv by rows of blocks and tile; rows 0: cuDNN."""
    found: dict[Case, dict[tuple[int, str], float]] = defaultdict(dict)
    for record in _lines("gpu_tiles.jsonl"):
        key, case = record["key"], _case(record["key"])
        if key["dtype"] != "fp16" or "us" not in record:
            continue
        library = min(record["us"][label] for label in LIBRARY)
        for sparsity in (50, 90):
            found[(*case[:3], sparsity)][0, "cuDNN"] = library
        if key["model"] != "resnet50":  # of which gpu_rounds has newer times
            found[case] |= {_form(label): us for label, us in record["us"].items() if label not in LIBRARY}
    for record in _lines("gpu_rounds.jsonl"):
        if record["key"]["part"] == "overlap":
            ours = {label[:-3]: us for label, us in record["us"].items() if label.endswith(" O0")}
            found[_case(record["key"])] |= {(record["key"]["rows"], label): us for label, us in ours.items()}
    return {case: of for case, of in found.items() if len(of) > 1}


def taken(case: Case, measured: dict[tuple[int, str], float]) -> float:
    """Microseconds of what the planner takes."""
    model, layer_name, block, sparsity = case
    conv = next(conv for conv in convs_alone(model) if conv.name == layer_name)
    layer = conv.layer(32, torch.float16, BLOCKS[block], 1 - sparsity / 100)
    if why_dense(layer, H100) is not None:
        return measured[0, "cuDNN"]
    form = choose(layer, H100).form
    tile = _tile(layer, form)
    of_form = {label: us for (rows, label), us in measured.items() if rows == form.rows}
    return of_form.get(tile, min(of_form.values()))


def regrets() -> list[dict[str, Any]]:
    """Sums over the convs of each network, in microseconds."""
    set_precision("fp16")
    sums: dict[tuple[str, str, int], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for case, measured in times().items():
        count = next(count for conv, count in convs_alone(case[0]).items() if conv.name == case[1])
        of = sums[case[0], case[2], case[3]]
        for i, us in enumerate((taken(case, measured), min(measured.values()), measured[0, "cuDNN"])):
            of[i] += count * us
    return [
        {"model": m, "block": b, "sparsity": s, "taken us": a, "best us": c, "cuDNN us": d, "taken over best": a / c}
        for (m, b, s), (a, c, d) in sums.items()
    ]


def _tile(layer: Layer, form: Form) -> str:
    found = work(layer.grid, layer.columns, form, 2)
    sizes = (layer.pixels, found.unions, found.steps, found.lanes, found.depth, prod(layer.grid.kernel_size))
    tile, _ = choose_tile(*sizes, "16", H100.processors, H100.target)
    return name(tile)


def _form(label: str) -> tuple[int, str]:
    """Rows and tile of "gather, 2 rows, 64x64x64 w4 s2"."""
    *form, tile = label.split(", ")
    return (int(form[1].split()[0]) if len(form) > 1 else 1), tile


def _case(key: dict[str, Any]) -> Case:
    return key["model"], key["layer"], key["block"], key["sparsity"]


def _lines(name: str) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, (RESULTS / name).read_text().splitlines())


if __name__ == "__main__":
    print(tabulate(regrets(), headers="keys", floatfmt=".3f"))
