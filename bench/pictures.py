"""The pictures of the documentation: the page of `fxdbsr report resnet50 --block 32x32 --sparsity 0.5`, and its graph.

    python -m bench.pictures [--out docs/images]

Needs Chromium and chromedriver.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from fxdbsr.cli import main as fxdbsr

WIDTH, HEIGHT = 1280, 1000


def main() -> int:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    options = webdriver.ChromeOptions()
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.binary_location = str(shutil.which("chromium"))
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "resnet50.html"
        command = ["report", "resnet50", "--block", "32x32", "--sparsity", "0.5", "--html", str(page)]
        if fxdbsr([*command, "--json", str(Path(folder) / "resnet50.json")]) != 0:
            return 1
        driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
        try:
            size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            driver.get(page.as_uri())
            driver.execute_script('document.querySelector("#graph").style.height = "22rem"')
            driver.execute_script('dispatchEvent(new Event("resize"))')
            args.out.mkdir(parents=True, exist_ok=True)
            driver.save_screenshot(str(args.out / "report.png"))
        finally:
            driver.quit()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
