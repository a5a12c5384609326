"""timm models of several conv families: prepared, the same bit for bit; half of the blocks off, converted equal.

All families are in `python -m bench.timm_models`, with its results in bench/results/timm_models.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.timm_models import FAMILIES, check

RESULTS = Path(__file__).parents[1] / "bench" / "results" / "timm_models.json"


@pytest.mark.parametrize(
    "name", ["resnet10t", "mobilenetv3_small_050", "ghostnet_050", "repvgg_a0", "lcnet_035", "convnext_atto"]
)
def test_a_timm_model_is_prepared_and_converted_equal(name: str) -> None:
    outcome = check(name, 32)
    assert outcome.passed, outcome
    assert outcome.blocked


def test_forty_families_are_in_the_results_and_pass() -> None:
    passed = {line["model"] for line in json.loads(RESULTS.read_text())["models"] if line["passed"]}
    assert len(set(FAMILIES) & passed) >= 40
