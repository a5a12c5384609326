"""bench/accuracy.py: every arm trains for an epoch and meets its sparsity, runs resume, the table and the figure."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxdbsr
from bench.accuracy import describe, run, run_all
from bench.accuracy_arms import ARMS
from bench.accuracy_figure import draw
from bench.accuracy_live import LivePaths
from bench.accuracy_nets import make_net, make_prepared
from bench.accuracy_order import ChannelOrder
from bench.accuracy_page import PAGES, rendered
from bench.accuracy_plans import PLANS
from bench.accuracy_records import append, changes, key, key_of, read
from bench.accuracy_scores import SCORES
from bench.accuracy_setting import Setting
from bench.accuracy_steps import divide_by_own_norms_, let_masked_blocks_learn
from bench.accuracy_table import Difference, difference, groups, rows
from bench.accuracy_training import Training
from bench.accuracy_trials import TRIALS
from bench.accuracy_tuned import NARROW, TUNED, TUNED_DEEP, TUNED_DIGITS, TUNED_NARROW, at
from bench.accuracy_words import records, verdict
from fxdbsr.generated import load_generated
from fxdbsr.images import ImageSet
from fxdbsr.layers import blocked_layers

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = Setting("scaled", 0, 0.6, width=8, epochs=2, batch=32)


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(data: str, draw: int = 0) -> ImageSet:
        return load_generated(256, 200, size=16, difficulty=0.2, shapes=6, textures=4, seed=draw)

    for module in ("training", "cost", "schedule", "channels", "probe"):
        monkeypatch.setattr(f"bench.accuracy_{module}.load", load)


def setting_of(arm: str) -> Setting:
    if arm in ("clamp", "proximal"):
        return replace(TINY, arm=arm, sparsity=None, gamma=0.05)
    return replace(TINY, arm=arm, sparsity=None if arm == "dense" else 0.6)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_and_meets_its_sparsity(arm: str) -> None:
    pytest.importorskip("torch_pruning", reason="Torch-Pruning is a peer of the bench alone")
    record = run(setting_of(arm))
    assert 0 <= record["accuracy"] <= 100
    if record["sparsity"] is not None:
        assert record["sparsity_macs"] == pytest.approx(0.6, abs=0.06)
    assert record["sparsity_macs_needed"] >= record["sparsity_macs"] - 1e-9


LEADS: dict[str, dict[str, Any]] = {
    "explained": {"score": "explained"},
    "fisher": {"score": "fisher"},
    "clean": {"clean": True},
    "measured": {"measured": True},
    "growth": {"growth": 0.2},
    "shrink": {"shrink": 0.3},
    "distilled": {"dense": 0.5, "distill": 0.5},
    "unscaled": {"scales": False, "clean": True},
    "fine_tuned": {"source": True},
    "ordered": {"scales": False, "order": 2},
    "early": {"early": True},
    "own_norms": {"own_norms": 1.0},
    "clipped": {"clip": 0.5},
    "share": {"score": "share"},
    "both": {"score": "both"},
    "feedback": {"feedback": 0.01},
}


@pytest.mark.parametrize("options", LEADS.values(), ids=LEADS)
def test_every_lead_trains_and_meets_its_sparsity(options: dict[str, Any]) -> None:
    record = run(replace(TINY, arm="lead", options=tuple(sorted(options.items()))))
    assert record["sparsity_macs"] == pytest.approx(0.6, abs=0.06)


def test_a_scale_over_its_blocks_squared_norm_moves_the_block_as_far_as_its_weights_do() -> None:
    model = fxdbsr.prepare(nn.Conv2d(4, 4, 3).double(), block_size=(2, 2))
    (layer,) = blocked_layers(model)
    images = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model(images).square().sum().backward()
    weight = layer.weight.detach()
    assert layer.weight.grad is not None
    assert layer.scale.grad is not None
    along = layer.grid.block_sum(weight * layer.weight.grad) / layer.grid.block_sum(weight.square()).sqrt()
    divide_by_own_norms_([layer], 1.0)
    moved = layer.scale.grad * layer.grid.block_sum(weight.square()).sqrt()
    torch.testing.assert_close(moved.double(), along)


def test_masked_blocks_may_learn_and_outputs_stay() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Flatten())
    model = fxdbsr.prepare(net, 2)
    (layer,) = blocked_layers(model)
    layer.set_mask(torch.tensor([[True, False], [True, True]]))
    x = torch.randn(3, 4, 2, 2)
    before = model(x)
    before.square().sum().backward()
    plain, layer.weight.grad = layer.weight.grad, None
    let_masked_blocks_learn(model, 0.5)
    after = model(x)
    after.square().sum().backward()
    assert torch.equal(before, after)
    assert plain is not None
    assert layer.weight.grad is not None
    masked = layer.grid.expand_mask(~layer.mask).bool()
    assert not plain[masked].any()
    assert layer.weight.grad[masked].all()
    assert torch.allclose(layer.weight.grad[~masked], plain[~masked])


def test_scores_that_look_at_the_layer() -> None:
    e = torch.tensor([[4.0, 1.0], [2.0, 0.5]])
    assert torch.allclose(SCORES["share"](e), torch.tensor([[1.0, 1 / 7], [2 / 6, 0.5 / 7.5]]))
    assert torch.allclose(SCORES["row"](e), e * torch.tensor([[4 / 3], [2 / 3]]).sqrt())
    assert torch.allclose(SCORES["column"](e), e * torch.tensor([[1.6, 0.4]]).sqrt())
    assert torch.allclose(SCORES["both"](e), SCORES["row"](e) * SCORES["column"](e) / e)


def test_the_arm_scaled_as_reported_is_the_sparsifier_mask_for_mask() -> None:
    (begin,) = {tuned["scaled"]["begin"] for tuned in (TUNED, TUNED_DIGITS)}
    setting = replace(TINY, begin=begin)
    mine, theirs = ARMS["scaled"](setting), make_prepared(setting)
    reference = Training(theirs, setting)
    example = reference.data.test_images[:1]
    fxdbsr.Sparsifier(theirs, reference.optimizer, target=0.6, of="macs", steps=reference.steps, example_inputs=example)
    reference.run()
    for a, b in zip(blocked_layers(mine), blocked_layers(theirs), strict=True):
        assert torch.equal(a.mask, b.mask)
        assert torch.equal(a.scale, b.scale)
        assert torch.equal(a.weight, b.weight)


def test_a_setting_gives_the_same_record_twice() -> None:
    first, second = run(TINY), run(TINY)
    assert first | {"cpu_seconds": 0} == second | {"cpu_seconds": 0}


def test_blocks_behind_a_dead_row_and_before_a_dead_column_are_useless() -> None:
    model = make_prepared(TINY)
    layers = {layer.name: layer for layer in blocked_layers(model)}
    kept = {name: torch.ones(layer.grid.shape, dtype=torch.bool) for name, layer in layers.items()}
    kept["body.1.conv1"][0] = False
    kept["body.2.conv2"][:, 1] = False
    useful = dict(zip(layers, LivePaths(model).useful([keep.flatten() for keep in kept.values()]), strict=True))
    expected = {name: keep.clone() for name, keep in kept.items()}
    expected["body.1.conv2"][:, 0] = False
    expected["body.2.conv1"][1] = False
    for name, keep in expected.items():
        assert torch.equal(useful[name], keep.flatten()), name


def test_channels_in_another_order_compute_the_same_and_gather_energy() -> None:
    model = make_prepared(TINY)
    training = Training(model, TINY, epochs=1)
    training.run()
    model.eval()
    layers, x = blocked_layers(model), torch.randn(2, 3, 16, 16)
    before, weights = model(x), [layer.weight.clone() for layer in layers]
    gain = ChannelOrder(model, training.optimizer, [1.0] * len(layers)).improve_(
        lambda scores: [score >= torch.cat(scores).median() for score in scores]
    )
    assert gain > 0
    assert any(not torch.equal(layer.weight, old) for layer, old in zip(layers, weights, strict=True))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_clean_leaves_no_block_that_carries_nothing() -> None:
    record = run(replace(TINY, arm="lead", sparsity=0.85, options=(("clean", True),)))
    assert record["sparsity_macs_needed"] == pytest.approx(record["sparsity_macs"], abs=1e-4)


def test_runs_resume_and_a_half_written_line_is_trained_again(tmp_path: Path) -> None:
    out = tmp_path / "runs.jsonl"
    settings = [replace(TINY, seed=seed, epochs=1) for seed in (0, 1)]
    run_all(settings[:1], out)
    with out.open("a") as file:
        file.write(json.dumps(asdict(settings[1]))[:40])
    run_all(settings, out)
    records = read(out)
    assert [record["seed"] for record in records] == [0, 1]
    assert key(records[1]) == key_of(settings[1])
    before = out.read_bytes()
    run_all(settings, out)
    assert out.read_bytes() == before
    assert "scaled" in describe(records[0])


def record_of(arm: str, seed: int, accuracy: float, sparsity: float | None = 0.7, **others: Any) -> dict[str, Any]:
    made = json.loads(json.dumps(asdict(Setting(arm, seed, sparsity, **others))))
    reached = {f"sparsity_{of}": sparsity or 0.0 for of in ("macs", "macs_needed", "params")}
    return {**made, **reached, "accuracy": accuracy}


def test_differences_are_paired_by_seed() -> None:
    records = [record_of("gradual", 0, 80.0), record_of("gradual", 1, 90.0), record_of("gradual", 2, 10.0)]
    records += [record_of("scaled", 1, 92.0), record_of("scaled", 0, 81.0)]
    gradual, scaled = groups(records)
    found = difference(scaled, gradual)
    assert (found.mean, found.count) == (1.5, 2)
    assert found.error == pytest.approx(0.5)
    assert rows(records, "gradual")[1][-1] == "+1.50 (0.50)"


@pytest.mark.parametrize("poster", [True, False])
@pytest.mark.parametrize("best", [90.0, 100.0])
def test_the_figure_is_drawn_with_and_without_errors_and_the_posters_curves(
    best: float, poster: bool, tmp_path: Path
) -> None:
    records = [record_of("dense", seed, best - seed, None) for seed in (0, 1)]
    records += [
        record_of(arm, seed, accuracy, s)
        for arm, accuracy in (("scaled", 100.0), ("slim", best))
        for seed in (0, 1)
        for s in (0.5, 0.9)
    ]
    draw(records, tmp_path / "figure.png", "test", poster)
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("plan", PLANS)
def test_plans_name_arms_that_exist_and_no_setting_twice(plan: str) -> None:
    settings = list(PLANS[plan]())
    assert len(set(settings)) == len(settings)
    assert {setting.arm for setting in settings} <= set(ARMS)


@pytest.mark.parametrize(
    ("width", "depth", "tuned"), [(32, 1, TUNED), (NARROW, 1, TUNED_NARROW), (NARROW, 2, TUNED_DEEP)]
)
def test_every_arm_takes_the_learning_rate_and_weight_decay_that_tuning_found_best(
    width: int, depth: int, tuned: dict[str, dict[str, Any]]
) -> None:
    plain = json.loads(json.dumps(asdict(Setting("", 0, width=width, depth=depth))))
    same = ["data", "net", "width", "depth", "epochs", "end", "power"] + (["begin"] if depth == 1 else [])
    runs = [r for r in records("tuning") if r["gamma"] is None and all(r[name] == plain[name] for name in same)]
    tried: dict[str, dict[tuple[float, float], list[float]]] = {}
    for record in runs:
        if depth > 1 and record["sparsity"] not in (None, 0.7):
            continue
        if record["arm"] != "lead" or record["options"] == [["early", True]]:
            arm = "scaled" if record["arm"] == "lead" else record["arm"]
            rates = record["lr"], record["weight_decay"]
            tried.setdefault(arm, {}).setdefault(rates, []).append(record["accuracy"])
    assert len(tried) >= 6
    for arm, of_arm in tried.items():
        means = {rates: sum(values) / len(values) for rates, values in of_arm.items()}
        assert (tuned[arm]["lr"], tuned[arm]["weight_decay"]) == max(means, key=means.__getitem__), arm


def test_one_shot_pruning_of_deeper_nets_goes_when_tuning_found_it_best() -> None:
    runs = [r for r in records("tuning") if r["depth"] == 2 and (r["lr"], r["weight_decay"]) == (0.8, 2e-3)]

    def best(arm: str, sparsity: float) -> float:
        of_end: dict[float, float] = {}
        for r in runs:
            if (r["arm"], r["sparsity"]) == (arm, sparsity):
                of_end[r["end"]] = of_end.get(r["end"], 0.0) + r["accuracy"]
        assert len(of_end) == 3
        return max(of_end, key=of_end.__getitem__)

    for arm, sparsity in (("once", 0.7), ("once_layer", 0.7), ("once_layer", 0.9)):
        assert at(arm, 0, sparsity, TUNED_DEEP[arm]).end == best(arm, sparsity)


def test_a_narrow_net_has_narrower_stages_alone() -> None:
    net = make_net(TINY, 0.5)
    assert (net.conv1.out_channels, net.fc.in_features, net.fc.out_features) == (4, 16, 24)  # type: ignore[union-attr]


def test_a_block_before_a_conv_without_blocks_is_useless() -> None:
    model = make_prepared(TINY)
    layers = {layer.name: layer for layer in blocked_layers(model)}
    kept = {name: torch.ones(layer.grid.numel().shape, dtype=torch.bool) for name, layer in layers.items()}
    kept["body.0.conv2"][:] = False
    useful = dict(zip(layers, LivePaths(model).useful([keep.flatten() for keep in kept.values()]), strict=True))
    assert not useful["body.0.conv1"].any()


# ---------------------------------------------------------------- the pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_holds_the_tables_that_the_result_files_give(page: Path) -> None:
    assert page.read_text() == rendered(page.read_text()), "run python -m bench.accuracy publish"


@pytest.mark.parametrize(
    ("mean", "error", "count", "word"),
    [(1.0, 0.4, 5, "better"), (-1.0, 0.4, 5, "worse"), (0.7, 0.4, 5, "tie"), (9.0, 0.1, 2, "too few seeds")],
)
def test_better_is_more_than_two_paired_errors_over_three_seeds(
    mean: float, error: float, count: int, word: str
) -> None:
    assert verdict(Difference(mean, error, count)) == word


def test_a_trial_stands_against_gradual_pruning_in_the_same_circumstances() -> None:
    for trial in TRIALS:
        ours, theirs = (json.loads(json.dumps(asdict(side(7, 0.9, 1)))) for side in (trial.ours, trial.theirs))
        assert theirs["arm"] == "gradual" or ["scales", False] in theirs["options"]
        apart = {name for name in ours if ours[name] != theirs[name]} - {"arm", "options"}
        assert apart == set(trial.changes), trial.idea


def test_the_tables_of_trials_pair_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.accuracy_words.RESULTS", tmp_path)
    trial = TRIALS[1]
    for seed, gain in ((100, 1.0), (101, 2.0), (102, 3.0)):
        for side, accuracy in ((trial.ours, 80 + gain), (trial.theirs, 80.0)):
            setting = json.loads(json.dumps(asdict(side(seed, 0.9, 1))))
            append(tmp_path / "accuracy_trials.jsonl", {**setting, "accuracy": accuracy})
    text = rendered("<!-- trials -->\n<!-- end -->")
    assert trial.idea in text
    assert "+2.00 (0.58)" in text
    assert "better" in text


def test_a_record_tells_how_its_setting_differs_from_the_plain_one() -> None:
    assert changes(record_of("scaled", 3, 90.0, lr=0.2)) == {"seed": 3, "sparsity": 0.7, "lr": 0.2}
