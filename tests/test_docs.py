"""README, docs and walk-through: every block of code runs, tables are up to date, no speed stands without a file."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fxdbsr
from bench import tables
from fxdbsr.cli import main
from fxdbsr.passes import CONVERT

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\S*).*?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What the project's continuous integration runs itself, or what takes minutes.
ELSEWHERE = ("pip ", "python3 -m venv", "pytest", ".ci/run", "torchrun ", "fxdbsr demo", "fxdbsr train", "sphinx-build")
SPEED = re.compile(
    r"\dx\b(?!\s?\d)|\d\sx\b(?!\s?[\d(])|\d\s?(ms|GFLOP/s|images/s|img/s)\b|\d\s(times|percent) (faster|slower)"
)


def blocks(path: Path, *languages: str) -> list[str]:
    return [code for language, code in BLOCK.findall(path.read_text()) if language in languages]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_pages_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=lambda page: page.name)
def test_the_pages_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", "").splitlines():
            for command in map(str.strip, re.split(r"&&|(?<=\s)#.*", line)):
                if command and not command.startswith((*ELSEWHERE, ". ")):
                    program, *arguments = shlex.split(command)
                    assert program == "fxdbsr", f"{page.name}: this test cannot run {command!r}"
                    assert main(arguments) == 0, command


def test_the_pages_list_every_pass_of_conversion_in_its_order() -> None:
    passes = [one.__name__ for one in CONVERT]
    table = (ROOT / "docs" / "convert.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)[: len(passes)] == passes
    graph = (ROOT / "docs" / "design.md").read_text().partition("convert   eval graph")[2].partition("report  ")[0]
    assert re.findall(r"\w+", graph) == passes


def test_every_other_block_parses_or_is_no_code() -> None:
    parsers = {"toml": tomllib.loads, "json": json.loads}
    for page in PAGES:
        for language, code in BLOCK.findall(page.read_text()):
            if language in parsers:
                parsers[language](code)
            else:
                known = language in ("python", "sh", "text", "") or language.startswith("{")
                assert known, f"{page.name}: no test runs a block of {language!r}"


def test_the_walk_through_runs_on_a_smaller_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = (ROOT / "examples" / "walkthrough.py").read_text()
    settings = next(line for line in source.splitlines() if line.startswith("MODEL, "))
    small = source.replace(settings, settings.replace("resnet50", "resnet18").replace("224", "64").replace(" 10", " 1"))
    assert small != source
    namespace: dict[str, object] = {}
    for cell in re.split(r"^(?=# %%)", small, flags=re.MULTILINE):
        exec(compile(cell, "walkthrough.py", "exec"), namespace)
    assert "ms, median of 1" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"walkthrough.html", "walkthrough.svg"}


# ---------------------------------------------------------------- figures


def test_the_tables_are_those_that_the_result_files_give() -> None:
    stale = [page.name for page in tables.pages() if page.read_text() != tables.rendered(page.read_text())]
    assert stale == [], "run python -m bench.tables"


def test_a_table_of_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one of cpu, .* got 'nothing'"):
        tables.rendered("<!-- table nothing -->\n<!-- end of table -->")


def test_every_speed_stands_in_a_table_made_from_a_file_or_beside_the_name_of_one() -> None:
    for page in PAGES:
        text = tables.PLACE.sub("", page.read_text())
        text = BLOCK.sub("", text)
        for paragraph in re.split(r"\n\s*\n", text):
            files = re.findall(r"bench/results/[\w.]+", paragraph)
            assert not SPEED.search(paragraph) or files, f"{page.name}: a speed without a file: {paragraph}"
            for name in files:
                assert (ROOT / name).exists(), f"{page.name}: {name} is not there"


def test_the_arithmetic_page_rests_on_totals_within_one_percent() -> None:
    results = json.loads((ROOT / "bench" / "results" / "arithmetic.json").read_text())["results"]
    assert [row["row"] for row in results] == ["A", "B"]
    assert all(abs(row[key]) < 0.01 for row in results for key in ("params_off", "macs_off"))


# ---------------------------------------------------------------- site


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module, reason="the extra docs is not installed")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="{page.stem}.html"' in index or page.stem == "index", page.name
    api = (tmp_path / "api.html").read_text()
    assert all(f'id="fxdbsr.{name}"' in api for name in fxdbsr.__all__)
