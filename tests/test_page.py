"""The page in headless Chromium, driven through chromedriver; and what can be told from its text alone."""

from __future__ import annotations

import base64
import io
import json
import shutil
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fxdbsr
from fxdbsr import Report
from fxdbsr.models import resnet20
from fxdbsr.reporting.columns import columns_of
from fxdbsr.reporting.masks import KEPT

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="Chromium or chromedriver is not installed"
)
HISTORY = [{"epoch": i, "loss": 2.0 / (i + 1), "sparsity": 0.1 * i, "note": "x", "nan": float("nan")} for i in range(6)]
EVIL = "<img src=x onerror=hacked=1>'&"  # torch.fx itself cannot trace a name with a double quote


def half_off(model: nn.Module, block: int) -> nn.Module:
    prepared = fxdbsr.prepare(model, block)
    return fxdbsr.block_prune_(prepared, 0.5, score="random", generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def report() -> Report:
    """A small prepared net with residuals, half of its blocks off, timed."""
    torch.manual_seed(0)
    return fxdbsr.report(half_off(resnet20(), 4), torch.randn(2, 3, 16, 16), measure=True)


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    report.save_html(path, HISTORY)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.binary_location = str(BROWSER)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


class Tab:
    """The page opened anew in a window of that size and scheme; `js` runs a script and returns its value."""

    def __init__(self, driver: Any, path: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        self.driver = driver
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        driver.get("about:blank")
        driver.get_log("browser")
        driver.get(path.as_uri())

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def become(self, script: str, value: Any) -> bool:
        """True as soon as `script` returns `value`, for events that the browser sends when it has time."""
        end = time.perf_counter() + 5
        while (found := self.js(script)) != value and time.perf_counter() < end:
            time.sleep(0.02)
        return bool(found == value)

    def column(self, name: str) -> list[str]:
        """The column's cells in the body of the table, from top to bottom."""
        script = """const heads = [...document.querySelectorAll("thead th")];
            const i = heads.findIndex(cell => cell.innerText.trim() === arguments[0]);
            const cells = [...document.querySelectorAll("tbody tr")].map(row => row.cells[i]);
            return cells.map(cell => cell.dataset.value ?? cell.innerText)"""
        found: list[str] = self.js(script, name)
        return found

    def click_header(self, name: str) -> str | None:
        script = """const buttons = [...document.querySelectorAll("thead button")];
            const button = buttons.find(b => b.innerText.trim() === arguments[0]);
            button.click();
            return button.closest("th").ariaSort"""
        order: str | None = self.js(script, name)
        return order

    def view(self) -> list[float]:
        box = self.js('return document.querySelector("#graph").getAttribute("viewBox")')
        return [float(part) for part in box.split()]


# ---------------------------------------------------------------- in the browser


@needs_browser
def test_the_page_opens_without_a_message_on_the_console_and_asks_for_nothing(browser: Any, page: Path) -> None:
    tab = Tab(browser, page)
    assert browser.get_log("browser") == []
    assert (
        tab.js('return performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length') == 0
    )
    assert tab.js("return document.querySelectorAll('.chart').length") == 2


@needs_browser
def test_every_figure_on_the_page_is_the_reports(browser: Any, page: Path, report: Report) -> None:
    tab = Tab(browser, page)
    assert tab.column("layer") == [row.name for row in report.rows]
    for column in columns_of([*report.rows, report.other, report.total]):
        cells = tab.column(column.name)
        if column.value is None:
            assert cells == [column.cell(row) for row in report.rows], column.name
        else:
            assert [float(cell) for cell in cells] == [column.value(row) or 0 for row in report.rows], column.name
    script = """const cards = [...document.querySelectorAll("[data-field]")].map(e => e.dataset);
        return cards.map(d => [d.field, +d.dense, +d.now])"""
    total = report.total
    assert tab.js(script) == [
        ["macs", total.macs_dense, total.macs],
        ["flops", 2 * total.macs_dense, 2 * total.macs],
        ["params", total.params_dense, total.params],
        ["blocks", total.blocks_total, total.blocks_kept],
        ["ms", total.ms_dense, total.ms],
    ]
    foot = tab.js('return [...document.querySelectorAll("tfoot tr")].map(r => [...r.cells].map(c => c.dataset.value))')
    assert {str(total.macs_run), str(total.params), str(total.bytes)} <= set(foot[1])


@needs_browser
def test_headers_sort_by_click_and_by_key(browser: Any, page: Path, report: Report) -> None:
    tab = Tab(browser, page)
    assert tab.click_header("MACs kept") == "descending"
    kept = sorted((row.macs for row in report.rows), reverse=True)
    assert [int(cell) for cell in tab.column("MACs kept")] == kept
    assert tab.click_header("MACs kept") == "ascending"
    assert [int(cell) for cell in tab.column("MACs kept")] == kept[::-1]
    assert tab.click_header("layer") == "ascending"
    assert tab.column("layer") == sorted(row.name for row in report.rows)
    tab.js('[...document.querySelectorAll("thead button")].find(b => b.innerText === "bytes").focus()')
    tab.press("\ue007")
    assert [int(cell) for cell in tab.column("bytes")] == sorted((row.bytes for row in report.rows), reverse=True)
    assert tab.js('return document.querySelectorAll("th[aria-sort]").length') == 1


@needs_browser
def test_layers_are_found_by_name_and_by_change(browser: Any, page: Path, report: Report) -> None:
    tab = Tab(browser, page)
    tab.js('document.querySelector("#filter").focus()')
    tab.press("LAYER2")
    shown = 'return [...document.querySelectorAll("tbody tr:not([hidden])")].map(r => r.cells[0].innerText)'
    assert tab.js(shown) == [row.name for row in report.rows if "layer2" in row.name]
    assert tab.js('return document.querySelector("#shown").innerText') == f"7 of {len(report.rows)} layers"
    tab.js('const f = document.querySelector("#filter"); f.value = ""; document.querySelector("#changed").click()')
    assert tab.js(shown) == [row.name for row in report.rows if row.changed]


@needs_browser
def test_the_graph_zooms_and_moves_by_button_wheel_mouse_and_key(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    tab = Tab(browser, page)
    graph = browser.find_element(By.ID, "graph")
    start = tab.view()
    tab.js('document.querySelector("#larger").click()')
    assert tab.view()[2] == pytest.approx(start[2] / 1.25, rel=1e-3)
    tab.js('document.querySelector("#start").click()')
    assert tab.view() == start
    tab.js('document.querySelector("#graph").dispatchEvent(new WheelEvent("wheel", {deltaY: 120, cancelable: true}))')
    assert tab.view()[2] > start[2]
    tab.js('document.querySelector("#fit").click()')
    box = tab.js('const b = document.querySelector("#graph").getBBox(); return [b.x, b.y, b.width, b.height]')
    x, y, width, height = tab.view()
    assert x <= box[0]
    assert y <= box[1]
    assert x + width >= box[0] + box[2]
    assert y + height >= box[1] + box[3]
    tab.js('document.querySelector("#start").click(); document.querySelector("#graph").focus()')
    tab.press("\ue015")  # down
    assert tab.view()[1] > start[1]
    tab.press("+", "0")
    assert tab.view() == start
    ActionChains(browser).drag_and_drop_by_offset(graph, -40, -30).perform()
    assert tab.view()[:2] == pytest.approx([start[0] + 40, start[1] + 30], abs=2)


@needs_browser
def test_a_box_of_the_graph_leads_to_its_row(browser: Any, page: Path, report: Report) -> None:
    tab = Tab(browser, page)
    links = tab.js(
        'return [...document.querySelectorAll("#graph a")].map(a => [a.getAttribute("href"), a.textContent])'
    )
    assert len(links) == len(report.rows)
    for (href, text), row in zip(links, report.rows, strict=True):
        assert row.name in text
        assert tab.js(f"return document.querySelector('{href}').cells[0].innerText") == row.name


@needs_browser
def test_a_mask_opens_large_turns_to_the_next_and_gives_the_focus_back(
    browser: Any, page: Path, report: Report
) -> None:
    tab = Tab(browser, page)
    state = """const d = document.querySelector("dialog"), c = d.querySelector("canvas");
        return [d.open, d.querySelector("h2").innerText, c.width, c.height]"""
    tab.js('document.querySelectorAll(".mask")[1].focus()')
    tab.press("\ue007")
    name = report.rows[1].name
    mask = report.masks[name]
    opened, title, width, height = tab.js(state)
    assert (opened, title) == (True, name)
    assert min(width, height) >= 100
    assert width * mask.shape[0] == height * mask.shape[1]
    pixels = """const c = document.querySelector("dialog canvas"), p = c.getContext("2d"), [r, n] = arguments, out = [];
        for (let i = 0; i < r; i++) for (let j = 0; j < n; j++) {
          const d = p.getImageData((j + .5) * c.width / n, (i + .5) * c.height / r, 1, 1).data;
          out.push(d[2] - d[0] > 60);
        }
        return out"""
    assert tab.js(pixels, *mask.shape) == mask.flatten().tolist()
    tab.press("\ue014")  # right
    assert tab.js(state)[1] == report.rows[2].name
    tab.press("\ue00c")  # escape
    assert tab.js(state)[0] is False
    assert tab.become("return document.activeElement.dataset.name", report.rows[2].name)


@needs_browser
def test_everything_is_reached_by_the_tab_key_in_the_order_of_the_page(browser: Any, page: Path) -> None:
    tab = Tab(browser, page)
    count = tab.js('return document.querySelectorAll("main button, main input, #graph, .wide").length')
    seen = []
    for _ in range(count + 1):
        tab.press("\ue004")
        seen.append(
            tab.js("const e = document.activeElement; return e.id || e.innerText || e.dataset.name || e.className")
        )
    assert seen[:8] == ["theme", "larger", "smaller", "fit", "start", "graph", "filter", "changed"]
    assert len(seen) == count + 1
    assert seen[-1] == "fc" or "layer3" in seen[-1]
    assert tab.js("return getComputedStyle(document.activeElement).outlineStyle") != "none"


@needs_browser
def test_the_page_follows_the_systems_light_or_dark_until_the_button_is_pressed(browser: Any, page: Path) -> None:
    def brightness(tab: Tab) -> tuple[float, float]:
        colours = tab.js("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
        back, ink = (sum(map(int, c[c.index("(") + 1 : -1].split(",")[:3])) / 765 for c in colours)
        return back, ink

    light, dark = brightness(Tab(browser, page)), brightness(Tab(browser, page, scheme="dark"))
    assert light[0] - light[1] > 0.7
    assert dark[1] - dark[0] > 0.7
    tab = Tab(browser, page, scheme="dark")
    tab.js('document.querySelector("#theme").click()')
    assert brightness(tab) == light


@needs_browser
@pytest.mark.parametrize("width", [320, 390])
def test_on_a_phone_nothing_runs_off_the_side_and_text_can_be_read(browser: Any, page: Path, width: int) -> None:
    tab = Tab(browser, page, width, 844)
    assert tab.js("return document.documentElement.scrollWidth") == width
    small = """return [...document.querySelectorAll("body *")].filter(e => e.childElementCount === 0 && e.innerText &&
        parseFloat(getComputedStyle(e).fontSize) < 11.5).length"""
    assert tab.js(small) == 0
    tab.js('document.querySelectorAll(".mask")[3].click()')
    box = tab.js('const b = document.querySelector("dialog").getBoundingClientRect(); return [b.left, b.right]')
    assert box[0] >= 0
    assert box[1] <= width


@needs_browser
def test_names_with_html_are_text_and_run_nothing(browser: Any, tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module(EVIL, nn.Conv2d(8, 8, 3))
    found = fxdbsr.report(half_off(model, 4), torch.randn(1, 8, 5, 5))
    found.save_html(tmp_path / "evil.html", [{"epoch": 0, EVIL: 1.0}, {"epoch": 1, EVIL: 2.0}])
    tab = Tab(browser, tmp_path / "evil.html")
    tab.js('document.querySelector(".mask").click()')
    assert tab.js("return window.hacked") is None
    assert browser.get_log("browser") == []
    assert tab.column("layer") == [EVIL]
    assert tab.js('return document.querySelector("dialog h2").textContent') == EVIL
    assert EVIL in tab.js('return document.querySelector("#graph").textContent')


@needs_browser
def test_a_model_of_a_thousand_layers_opens_within_two_seconds(browser: Any, tmp_path: Path) -> None:
    model = nn.Sequential(*(layer for _ in range(1000) for layer in (nn.Conv2d(64, 64, 1), nn.ReLU())))
    found = fxdbsr.report(half_off(model, 8), torch.randn(1, 64, 1, 1))
    found.save_html(tmp_path / "large.html")
    shown = """const done = arguments[0]; requestAnimationFrame(() => setTimeout(() => done(performance.now())))"""
    times = []
    for _ in range(3):  # a busy machine may stop the browser for longer than it works
        tab = Tab(browser, tmp_path / "large.html")
        times.append(browser.execute_async_script(shown) / 1000)
        if times[-1] < 2:
            break
    assert min(times) < 2
    assert len(tab.column("layer")) == 1000
    assert tab.click_header("MACs kept") == "descending"


# ---------------------------------------------------------------- from its text


class Reader(HTMLParser):
    """Tags that are open, values of cells by row, sources of pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.values: list[list[str]] = []
        self.pictures: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)
        if tag == "tr":
            self.values.append([])
        if tag == "td":
            self.values[-1] += [value for key, value in attrs if key == "data-value" and value]
        self.pictures += [value or "" for key, value in attrs if key == "src"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_holds_the_figures_and_names_no_address(report: Report) -> None:
    text = report.to_html(HISTORY)
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert "://" not in text
    for row, values in zip([*report.rows, report.other, report.total], reader.values[1:], strict=True):
        assert {str(row.macs), str(row.macs_run), str(row.params), str(row.bytes)} <= set(values)
    for picture, name in zip(reader.pictures, report.masks, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).convert("RGB"))
        assert ((pixels == KEPT).all(2) == report.masks[name].numpy()).all()


def test_a_page_of_a_thousand_layers_is_made_in_two_seconds() -> None:
    model = nn.Sequential(*(nn.Conv2d(64, 64, 1) for _ in range(1000)))
    found = fxdbsr.report(fxdbsr.prepare(model, 8), torch.randn(1, 64, 1, 1))
    start = time.process_time()
    assert len(found.to_html()) < 2_500_000
    assert time.process_time() - start < 2


def test_a_model_without_convs_has_a_page() -> None:
    found = fxdbsr.report(nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4)), torch.tensor([1, 2]))
    text = found.to_html()
    assert "<dialog" not in text
    assert 'data-dense="48"' in text


def test_history_draws_a_curve_for_every_key_with_figures_and_leaves_out_what_is_not_finite() -> None:
    found = fxdbsr.report(nn.Conv2d(3, 3, 1), torch.ones(1, 3, 2, 2))
    text = found.to_html([*HISTORY, {"epoch": 6, "loss": float("inf"), "sparsity": 0.6}])
    assert text.count("<figure") == 2
    assert "epoch 0 to 5: first 2, lowest 0.3333, highest 2, last 0.3333<" in text
    assert "sparsity, fraction that is zero" in text
    assert "entry 0 to 1" in found.to_html([{"loss": 1.0}, {"loss": 2}])
    assert "<figure" not in found.to_html()
    assert "<figure" in found.to_html(json.loads('[{"step": 1, "top1_error": 0.5}]'))


@pytest.mark.parametrize(
    ("history", "message"), [({"loss": 1}, "expected a sequence of mappings, got dict"), ([1], "got int at 0")]
)
def test_a_history_of_another_kind_is_refused(history: Any, message: str) -> None:
    found = fxdbsr.report(nn.Conv2d(3, 3, 1), torch.ones(1, 3, 2, 2))
    with pytest.raises(TypeError, match=message):
        found.to_html(history)


def test_a_page_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    found = fxdbsr.report(nn.Conv2d(3, 3, 1), torch.ones(1, 3, 2, 2))
    with pytest.raises(OSError, match="No such file"):
        found.save_html(tmp_path / "none" / "page.html")
    with pytest.raises(OSError, match="it is a folder"):
        found.save_html(tmp_path)
