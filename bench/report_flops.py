"""Twice `macs_run` of the report against `FlopCounterMode`, for every torchvision model that torch.fx traces.

    python -m bench.report_flops [--models resnet18,vit_b_16] [--json bench/results/report_flops.json]

Each model is counted plain, prepared with a random half of its blocks off, and converted for `--backends`, on one
image of 128x128 where the model leaves the size open. The counter runs over a forward of its own, attention as
matrix products. Models that are in the file already are not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fxdbsr
from bench.coverage import build, example, switch_off_half, traceable_models
from fxdbsr.files import write
from fxdbsr.paired import provenance


@torch.no_grad()
def counted(model: nn.Module, x: Tensor) -> int:
    """FLOPs that `FlopCounterMode` counts in one eval forward."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.eval()(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


def compare(name: str, backends: list[str], size: int = 128) -> dict[str, Any]:
    """FLOPs of the model `name` in every form, by the report's rows and by the counter."""
    torch.manual_seed(0)
    model, x = build(name).eval(), example(name, 1, size)
    prepared = fxdbsr.prepare(model, 32)
    switch_off_half(prepared, torch.Generator().manual_seed(0))
    forms = {"plain": model, "prepared": prepared}
    forms |= {backend: fxdbsr.convert(prepared, backend=backend) for backend in backends}
    flops = {}
    for form, module in forms.items():
        found = fxdbsr.report(module, x)
        flops[form] = (2 * sum(row.macs_run for row in [*found.rows, found.other]), counted(module, x))
    return {
        "model": name,
        "input": "x".join(map(str, x.shape)),
        "flops_report": {form: report for form, (report, _) in flops.items()},
        "flops_counter": {form: counter for form, (_, counter) in flops.items()},
        "equal": all(report == counter for report, counter in flops.values()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", help="names; all that torch.fx traces by default")
    parser.add_argument("--backends", default="reference,auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    known = json.loads(args.json.read_text())["results"] if args.json and args.json.exists() else []
    results = {result["model"]: result for result in known}
    for name in args.models.split(",") if args.models else traceable_models():
        if name in results:
            continue
        results[name] = compare(name, args.backends.split(","))
        print(name, results[name]["equal"], flush=True)
        if args.json:
            write(args.json, json.dumps({"provenance": provenance(), "results": list(results.values())}, indent=1))
    print(tabulate([[name, result["input"], result["equal"]] for name, result in results.items()]))
    equal = sum(result["equal"] for result in results.values())
    print(f"{equal} of {len(results)} models equal in every form")
    return 0 if equal == len(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
