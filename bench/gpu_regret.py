"""What the planner's choices cost over the best ones that were measured, layer by layer (16 bits, batch 32).

    python -m bench.gpu_regret [--json PATH]

Of every conv the time of the form and tile that the planner takes today, or of cuDNN's conv where it stays dense,
beside the least of all. On an H100 many forms and tiles were measured (`gpu_rounds.jsonl`, `gpu_tiles.jsonl`), on an
H200 cuDNN's fused conv and the one that the planner took then (`gpu.jsonl`, part `layers`), and all that there is on
some of them (part `candidates`) and on the layers worked by hand (part `hand`). What was not measured counts as the
best of its form that was.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from bench.gpu_convs import convs, convs_alone
from bench.gpu_fit import timed_tiles
from bench.gpu_hand import HAND, MORE, dtype_of, layer_of
from bench.gpu_layers import DENSE
from bench.gpu_setting import BLOCKS, set_precision
from bench.gpu_tiles import name, planned
from bench.tables_text import RESULTS
from fxdbsr.kernels.triton_device import H100, H200, Device
from fxdbsr.kernels.triton_layer import Layer
from fxdbsr.kernels.triton_roofline import choose, why_dense

Case = tuple[str, str, str, int]  # model, layer, block, sparsity
Times = dict[tuple[int, str], float]  # microseconds by rows of blocks and tile; rows 0: cuDNN
LIBRARY = ("eager", "fused cuDNN")
CUDNN = (0, "cuDNN")


def times_h100() -> dict[Case, Times]:
    """Of each conv, in many forms and tiles."""
    found: dict[Case, Times] = defaultdict(dict)
    for record in _lines("gpu_tiles.jsonl"):
        key, case = record["key"], _case(record["key"])
        if key["dtype"] != "fp16" or "us" not in record:
            continue
        library = min(record["us"][label] for label in LIBRARY)
        for sparsity in (50, 90):
            found[(*case[:3], sparsity)][CUDNN] = library
        if key["model"] != "resnet50":  # of which gpu_rounds has newer times
            found[case] |= {_form(label): us for label, us in record["us"].items() if label not in LIBRARY}
    for record in _lines("gpu_rounds.jsonl"):
        if record["key"]["part"] == "overlap":
            ours = {label[:-3]: us for label, us in record["us"].items() if label.endswith(" O0")}
            found[_case(record["key"])] |= {(record["key"]["rows"], label): us for label, us in ours.items()}
    return {case: of for case, of in found.items() if len(of) > 1}


def times_h200() -> dict[Case, Times]:
    """Of each conv, in the form that the planner took then, and dense; of some in many forms and tiles."""
    found: dict[Case, Times] = {}
    for record in _lines("gpu.jsonl"):
        key = record["key"]
        if key["part"] == "layers" and "tile" in record and key["dtype"] == "fp16":
            sparse = _form(f"{record['form']}, {record['tile']}")
            found[_case(key)] = {CUDNN: record["us fused cuDNN"][1], sparse: record["us sparse"][1]}
        elif key["part"] == "candidates":  # newer than the times of part "layers", which stand before
            conv = next(conv for conv in convs(key["model"]) if conv.name == key["layer"])
            layer = conv.layer(key["batch"], torch.float16, BLOCKS[key["block"]], 1 - key["sparsity"] / 100)
            of = {(form.rows, name(tile)): us for form, tile, us in timed_tiles(layer, record)}
            found[_case(key)] |= {CUDNN: record["us fused cuDNN"][1], **of}
    return found


def taken(layer: Layer, measured: Times, device: Device) -> float:
    """Microseconds of what the planner takes."""
    if why_dense(layer, device) is not None:
        return measured[CUDNN]
    form = choose(layer, device).form
    tile = name(planned(layer, form, device)[0])
    ours = {key: us for key, us in measured.items() if key != CUDNN}
    of_form = {label: us for (rows, label), us in ours.items() if rows == form.rows} or {"": min(ours.values())}
    return of_form.get(tile, min(of_form.values()))


def regrets() -> list[dict[str, Any]]:
    """Sums over the convs of each network, in microseconds, and where a sparse kernel is slower than cuDNN."""
    set_precision("fp16")
    found: dict[tuple[str, str, str, int], dict[str, Any]] = {}
    for gpu, device, listed, times in (("H100", H100, convs_alone, times_h100()), ("H200", H200, convs, times_h200())):
        for (model, layer_name, block, sparsity), measured in times.items():
            conv, count = next((conv, n) for conv, n in listed(model).items() if conv.name == layer_name)
            layer = conv.layer(32, torch.float16, BLOCKS[block], 1 - sparsity / 100)
            us, case = taken(layer, measured, device), (gpu, model, block, sparsity)
            of = found.setdefault(case, {"taken us": 0.0, "best us": 0.0, "cuDNN us": 0.0, "slower": 0, "worst": 1.0})
            for which, one in (("taken us", us), ("best us", min(measured.values())), ("cuDNN us", measured[CUDNN])):
                of[which] += count * one
            of["slower"] += count * (us > measured[CUDNN])
            of["worst"] = max(of["worst"], us / measured[CUDNN])
    heads = ("gpu", "model", "block", "sparsity")
    return [
        {**dict(zip(heads, case, strict=True)), **of, "taken over best": of["taken us"] / of["best us"]}
        for case, of in found.items()
    ]


def by_hand(rows: Sequence[tuple[Any, ...]] = HAND) -> list[dict[str, Any]]:
    """Of each layer worked by hand what the planner takes today and the best of all that was measured, on an H200."""
    found = []
    measured = {r["key"]["layer"]: r for r in _lines("gpu.jsonl") if r["key"]["part"] == "hand"}
    for row in rows:
        set_precision(dtype_of(row))
        layer, record = layer_of(row), measured[row[0]]
        times = {key.removeprefix("us "): value[1] for key, value in record.items() if key.startswith("us ") and value}
        label = DENSE
        if why_dense(layer) is None:
            form = choose(layer).form
            tile, splits = planned(layer, form, H200)
            label = f"{form}, {tile.pixels}x{tile.outputs} w{tile.warps} s{tile.stages}"
            label += f", {splits} splits" if splits > 1 else ""
        best = min(times, key=times.__getitem__)
        found.append(
            {"layer": row[0], "taken": label, "us": times[label], "best": best, "over best": times[label] / times[best]}
        )
    return found


def _form(label: str) -> tuple[int, str]:
    """Rows and tile of "gather, 2 rows, 64x64x64 w4 s2"."""
    *form, tile = label.split(", ")
    return (int(form[1].split()[0]) if len(form) > 1 else 1), tile


def _case(key: dict[str, Any]) -> Case:
    return key["model"], key["layer"], key["block"], key["sparsity"]


def _lines(name: str) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, (RESULTS / name).read_text().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    found = {"networks": regrets(), "by hand": by_hand(), "more": by_hand(MORE)}
    for rows in found.values():
        print(tabulate(rows, headers="keys", floatfmt=".3f"))
    if options.json:
        options.json.write_text(json.dumps(rounded(found), indent=1) + "\n")


def rounded(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The rows with four digits behind the point."""
    return {
        name: [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        for name, rows in found.items()
    }


if __name__ == "__main__":
    main()
