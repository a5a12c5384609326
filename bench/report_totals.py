"""Dense totals of the report against torchvision's own metadata, for all of its classification models.

Each model is made and run on the meta device, at the crop size of its weights, so that this takes a minute or
two and no memory. `_ops` is in GMACs with 3 decimals, `num_params` is exact.

    python bench/report_totals.py [--json bench/results/report_totals.json] [MODEL ...]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import nn
from torchvision.models import get_model, get_model_weights, list_models

import fxdbsr

# GoogLeNet's metadata leave out the auxiliary heads, which torchvision drops when it loads weights.
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False, "aux_logits": False},
    "inception_v3": {"init_weights": False},
}


def on_meta(name: str, crop: int) -> nn.Module:
    """The model `name` on the meta device; RegNets compute their widths with tensors and are moved there."""
    options = OPTIONS.get(name, {"image_size": crop} if name.startswith("vit") else {})
    with nullcontext() if name.startswith("regnet") else torch.device("meta"):
        model: nn.Module = get_model(name, weights=None, **options)
    return model.to("meta")


def compare(name: str) -> dict[str, Any]:
    """The report's totals of the model `name` and torchvision's, at the crop size of its default weights."""
    weights = next(iter(get_model_weights(name)))
    crop = weights.transforms().crop_size[0]
    model = on_meta(name, crop).eval()
    x = torch.empty(1, 3, crop, crop, device="meta")
    total = fxdbsr.report(model, x).total
    gmacs, params = weights.meta["_ops"], weights.meta["num_params"]
    found = round(total.macs_run / 1e9, 3)
    return {
        "model": name,
        "crop": crop,
        "gmacs": found,
        "gmacs_torchvision": gmacs,
        "params": total.params,
        "params_torchvision": params,
        "equal": found == gmacs and total.params == params,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="torchvision names; all by default")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    names = args.models or list_models(torchvision.models)
    results = [compare(name) for name in names]
    print(tabulate([result.values() for result in results], list(results[0]), floatfmt=".3f"))
    equal = sum(result["equal"] for result in results)
    print(f"{equal} of {len(results)} models equal")
    if args.json:
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        }
        data = {"versions": versions, "equal": equal, "models": len(results), "results": results}
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    return 0 if equal == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
