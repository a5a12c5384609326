"""The committed files about GPUs: what they claim, and that those that no GPU has made are what the code says today."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from bench import gpu_first, gpu_fit, gpu_plan, gpu_regret  # noqa: E402
from fxdbsr.kernels.triton_configs import PRECISIONS  # noqa: E402
from fxdbsr.kernels.triton_device import H100, H200  # noqa: E402
from fxdbsr.kernels.triton_measured import COSTS  # noqa: E402
from tests.triton_cases import float32_precision  # noqa: E402

RESULTS = Path(__file__).parents[1] / "bench" / "results"


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


@pytest.fixture(autouse=True)
def default_precision() -> Iterator[None]:
    """Switches that the bench sets are put back."""
    with float32_precision("tf32"):
        yield


def test_the_plan_covers_every_conv_of_three_networks() -> None:
    head, *rows = lines("gpu_plan.jsonl")
    assert head["measured"] is False
    for dtype in ("fp16", "tf32", "fp32"):
        for block in ("32x32", "128x32"):
            found = [row for row in rows if (row["dtype"], row["block"]) == (dtype, block)]
            counts = {m: sum(row["count"] for row in found if row["model"] == m) for m in gpu_plan.MODELS}
            assert counts == {"resnet50": 53, "resnext50_32x4d": 53, "vgg11": 8}
    said = [row[f"{sparsity} %"] for row in rows for sparsity in (50, 70, 90)]
    assert all(each["reason"] and each["choice"] in ("sparse", "dense") and each["ceiling"] >= 1 for each in said)


def test_the_plan_is_what_the_planner_says_today() -> None:
    head, *rows = lines("gpu_plan.jsonl")
    if head["triton"] != triton.__version__:
        pytest.skip(f"tiles depend on Triton; the file was made with {head['triton']}, this is {triton.__version__}")
    expected = [row for row in rows if row["model"] == "vgg11"]
    assert list(gpu_plan.rows(["vgg11"], ["fp16", "tf32", "fp32"], [32], ["32x32", "128x32"])) == expected


def test_every_compiled_tile_of_the_file_is_free_of_spills_and_faults() -> None:
    found = lines("gpu_compiled.jsonl")
    assert {(r["target"], r["precision"]) for r in found} == {
        (target, precision) for target in ("cuda:80", "cuda:90", "hip:gfx942") for precision in PRECISIONS
    } - {("hip:gfx942", "3xtf32")}
    assert all(r["spills"] == 0 and r["faults"] == [] for r in found)


def regret_of_the_file() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads((RESULTS / "gpu_regret.json").read_text())
    return found


def test_the_page_has_the_times_of_the_layers_worked_by_hand() -> None:
    page = (RESULTS.parents[1] / "docs" / "gpu.md").read_text().split("## Layers worked by hand")[1]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    dense = {r["key"]["layer"]: r["us fused cuDNN"][1] for r in lines("gpu.jsonl") if r["key"]["part"] == "hand"}
    rows = regret_of_the_file()["by hand"]
    expected = [(row["layer"], dense[row["layer"]], row["us"], row["us"] / row["over best"]) for row in rows]
    for (layer, *_, us_dense, us, best, _), (name, *times) in zip(cells[2:], expected, strict=True):
        assert layer == name
        assert [float(us_dense), float(us), float(best)] == pytest.approx(times, abs=0.06)


def test_what_the_planner_takes_is_near_the_best_that_was_measured_and_on_an_h200_never_slower_than_dense() -> None:
    found = gpu_regret.regrets()
    assert [row["gpu"] for row in found] == 5 * ["H100"] + 7 * ["H200"]
    for row in found:
        limit = 1.04 if row["gpu"] == "H100" else {"128x32": 1.02, "32x32": 1.04, "64x16": 1.06}[row["block"]]
        assert 1 <= row["taken over best"] < limit
    assert all(row["taken us"] < row["cuDNN us"] for row in found)
    assert all(row["slower"] == 0 for row in found if row["gpu"] == "H200")
    assert gpu_regret.rounded({"networks": found})["networks"] == regret_of_the_file()["networks"]


def test_what_is_taken_of_every_layer_worked_by_hand_is_within_5_percent_of_the_best() -> None:
    rows = gpu_regret.by_hand()
    assert gpu_regret.rounded({"by hand": rows})["by hand"] == regret_of_the_file()["by hand"]
    found = {row["layer"]: row["over best"] for row in rows}
    assert len(found) == 17
    assert max(found.values()) <= 1.05


def test_costs_of_tiles_are_as_far_off_the_measured_times_as_their_file_says() -> None:
    found = gpu_fit.samples()
    of_an_h100 = gpu_fit.errors([sample for sample in found if sample.device is H100])
    assert set(of_an_h100) == set(COSTS)
    assert all(len(values) >= 20 for values in of_an_h100.values())
    for key, values in of_an_h100.items():
        assert 0.05 < gpu_fit.root_mean_square(values) < (0.26 if key == ("16", 64, 32, 4, 4) else 0.16)
    of_an_h200 = gpu_fit.errors([sample for sample in found if sample.device is H200])
    enough = {key: values for key, values in of_an_h200.items() if len(values) >= 9}
    assert len(enough) == 11
    for key, values in enough.items():
        assert gpu_fit.root_mean_square(values) < (0.11 if key == ("16", 128, 64, 4, 2) else 0.10)


def test_every_record_of_a_gpu_names_it_its_versions_and_the_commit() -> None:
    for name in ("gpu.jsonl", "gpu_h100.jsonl", "gpu_tiles.jsonl", "gpu_rounds.jsonl"):
        for record in lines(name):
            said = [record[key] for key in ("device", "commit", "torch", "triton", "cudnn", "cuda")]
            assert record["measured"] is True
            assert all(said)
            assert "wrong" not in record


def test_targets_and_ceilings_on_the_page_are_those_of_the_bench_and_of_the_file() -> None:
    ceilings: dict[tuple[str, str, str], list[float]] = {}
    for record in lines("gpu_networks.jsonl"):
        assert record["measured"] is False
        key = record["key"]
        ceilings.setdefault((key["model"], key["dtype"], key["block"]), []).append(
            record["ceiling over compiled, convs"]
        )
    page = (RESULTS.parents[1] / "docs" / "gpu.md").read_text().split("| asked, batch 32")[1]
    rows = [line.split("|")[2:-1] for line in page.split("\n\n")[0].splitlines()[2:]]
    listed = [(key, wanted) for key, wanted in gpu_first.TARGETS.items() if key[0] != "vgg11_features"]
    for ((model, dtype, _, block, arm), wanted), (*cells, ceiling) in zip(listed, rows, strict=True):
        assert tuple(map(float, cells)) == wanted
        if arm == "sparse":  # rounded down
            pairs = zip(ceiling.split("/"), ceilings[model, dtype, block], strict=True)
            assert all(-1e-9 < found - float(said) < 0.01 for said, found in pairs)
