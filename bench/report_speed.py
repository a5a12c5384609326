"""How long a report takes, and how long its page takes to open in headless Chromium.

    python -m bench.report_speed [--json bench/results/report_speed.json]

Reports: ResNet-152 plain, prepared and converted, on one image of 224x224, wall time, median of `--rounds`. Pages: of
a chain of 1,000 convs with half of their blocks off, from the start of the navigation to the first frame after the
load event, median of `--rounds`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torchvision.models import resnet152

import fxdbsr
from fxdbsr.files import write
from fxdbsr.paired import provenance, seconds


def reports(rounds: int) -> dict[str, float]:
    """Median seconds of a report of ResNet-152 in its three forms."""
    x = torch.randn(1, 3, 224, 224)
    plain = resnet152().eval()
    prepared = fxdbsr.block_prune_(fxdbsr.prepare(plain, 32), 0.5)
    forms = {"plain": plain, "prepared": prepared, "converted": fxdbsr.convert(prepared)}
    return {
        form: median(seconds(lambda model=model: fxdbsr.report(model, x)) for _ in range(rounds))  # type: ignore[misc]
        for form, model in forms.items()
    }


def opening(rounds: int, layers: int = 1000) -> float:
    """Median seconds until the page of a chain of `layers` convs is shown."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chain = nn.Sequential(*(part for _ in range(layers) for part in (nn.Conv2d(64, 64, 1), nn.ReLU())))
    model = fxdbsr.block_prune_(fxdbsr.prepare(chain, 8), 0.5, score="random")
    options = webdriver.ChromeOptions()
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.binary_location = str(shutil.which("chromium"))
    shown = "const done = arguments[0]; requestAnimationFrame(() => setTimeout(() => done(performance.now())))"
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        fxdbsr.report(model, torch.randn(1, 64, 1, 1)).save_html(page)
        driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
        try:
            times: list[float] = []
            for _ in range(rounds):
                driver.get("about:blank")
                driver.get(page.as_uri())
                times.append(driver.execute_async_script(shown) / 1000)
        finally:
            driver.quit()
    return median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = [
        {"what": f"report of ResNet-152, {form}", "seconds": value, "limit_seconds": 3.0}
        for form, value in reports(args.rounds).items()
    ]
    rows.append({"what": "page of 1,000 layers opens", "seconds": opening(args.rounds), "limit_seconds": 2.0})
    print(tabulate([row.values() for row in rows], list(rows[0]), floatfmt=".2f"))
    if args.json:
        write(
            args.json, json.dumps({"provenance": provenance(), "rounds": args.rounds, "results": rows}, indent=1) + "\n"
        )
    return int(any(row["seconds"] > row["limit_seconds"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
