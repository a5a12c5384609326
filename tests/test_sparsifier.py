"""Sparsifier: the target is met, the schedule, the penalty, resuming, what is refused."""

from __future__ import annotations

import copy
import io
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxdbsr
from fxdbsr.layers import blocked_layers
from fxdbsr.sparsifier import Sparsifier

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.a, self.b = nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.shortcut, self.fc = nn.Conv2d(16, 24, 1, stride=2), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.b(torch.relu(self.a(x))) + self.shortcut(x))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


def prepared(form: str = "product") -> nn.Module:
    torch.manual_seed(0)
    return fxdbsr.prepare(Net(), 4, form=form)


def sgd(model: nn.Module, lr: float = 0.05, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(fxdbsr.param_groups(model, 1e-4), lr=lr, momentum=0.9, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    model.train()
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 5
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x), y))
        optimizer.step()


def masks(model: nn.Module) -> Tensor:
    return torch.cat([layer.mask.flatten() for layer in blocked_layers(model)])


X = torch.zeros(1, 3, 8, 8)


def test_it_says_what_it_was_asked_for_and_how_far_it_is() -> None:
    model = prepared()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, target=0.5, of="params", steps=20)
    assert repr(sparsifier) == "Sparsifier(target=0.5, of='params', 4 layers, step 0 of 20)"
    train(model, optimizer, 3)
    sparsifier.finalize()
    assert repr(sparsifier) == "Sparsifier(target=0.5, of='params', 4 layers, step 3 of 20, frozen)"
    assert repr(Sparsifier(model, optimizer, gamma=1.0)) == "Sparsifier(gamma=1.0, of='blocks', 4 layers, step 0)"


@pytest.mark.parametrize("of", ["blocks", "params", "macs"])
@pytest.mark.parametrize("target", [0.0, 0.37, 0.9])
def test_the_target_is_met_and_the_mask_freezes(of: str, target: float) -> None:
    model = prepared()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, target=target, of=of, steps=30)
    train(model, optimizer, 20)
    assert not sparsifier.frozen
    train(model, optimizer, 1, 20)
    assert sparsifier.frozen
    before = masks(model).clone()
    train(model, optimizer, 9, 21)
    costs = torch.cat([c.flatten() for c in sparsifier._costs.of(of)])
    assert abs(sparsifier.sparsity() - target) <= max(0.005, float(costs.max() / costs.sum()) / 2)
    assert sparsifier.sparsity(of) == pytest.approx(float(costs[~before].sum() / costs.sum()))
    assert torch.equal(before, masks(model))


def test_the_schedule_is_cubic_between_begin_and_end() -> None:
    model = prepared()
    optimizer = sgd(model, lr=0.0)
    sparsifier = Sparsifier(model, optimizer, target=0.8, steps=20, begin=0.2, end=0.6, interval=2)
    seen = []
    for step in range(20):
        train(model, optimizer, 1, step)
        seen.append(sparsifier.sparsity())
    half = 0.5 / masks(model).numel()
    for step in range(1, 21):
        ranked = min(12, step - step % 2) if step >= 4 else 0
        u = min(max((ranked - 4) / 8, 0), 1)
        assert seen[step - 1] == pytest.approx(0.8 * (1 - (1 - u) ** 3), abs=half + 1e-9)


@pytest.mark.parametrize(("end", "begin"), [(None, 0.3), (0.9, 0.3), (0.4, 0.2)])
def test_by_default_a_target_is_gone_for_from_30_percent_or_half_of_an_early_end(
    end: float | None, begin: float
) -> None:
    model = prepared()
    plan = Sparsifier(model, sgd(model), target=0.5, steps=10, end=end).plan
    assert (plan.begin, plan.end) == (begin, end or 0.67)


def test_masked_blocks_may_return_until_the_mask_freezes() -> None:
    model = prepared()
    optimizer = sgd(model, lr=0.0)
    sparsifier = Sparsifier(model, optimizer, target=0.5, steps=10, begin=0.0, end=1.0)
    train(model, optimizer, 9)
    layer = blocked_layers(model)[1]
    gone = (~layer.mask).nonzero()[0]
    factor = torch.ones_like(layer.scale)
    factor[tuple(gone)] = 100.0
    layer.grid.scale_(layer.weight.data, factor)
    train(model, optimizer, 1)
    assert layer.mask[tuple(gone)]
    assert sparsifier.frozen
    layer.grid.scale_(layer.weight.data, 1 - (factor - 1) / 99)
    sparsifier.finalize()
    assert layer.mask[tuple(gone)]


def spread_scales(model: nn.Module) -> None:
    """Scales between 1 and 3."""
    generator = torch.Generator().manual_seed(7)
    for layer in blocked_layers(model):
        layer.scale.data.copy_(1 + 2 * torch.rand(layer.scale.shape, generator=generator))


@pytest.mark.parametrize("when", ["before", "after"])
def test_blocks_are_ranked_by_the_scales_of_the_start(when: str) -> None:
    found = []
    for spread in (False, True):
        model = prepared()
        if spread and when == "before":
            spread_scales(model)
        sparsifier = Sparsifier(model, sgd(model, lr=0.0), target=0.5, steps=10)
        if spread and when == "after":
            spread_scales(model)
        sparsifier.finalize()
        found.append(masks(model))
    assert torch.equal(*found) == (when == "after")


def test_the_state_holds_the_scales_of_the_start() -> None:
    model = prepared()
    optimizer = sgd(model, lr=0.0)
    sparsifier = Sparsifier(model, optimizer, target=0.5, steps=10)
    state = sparsifier.state_dict()
    spread_scales(model)
    sparsifier.remove()
    second = Sparsifier(model, optimizer, target=0.5, steps=10)
    second.load_state_dict(state)
    sparsifier.finalize()
    expected = masks(model)
    second.finalize()
    assert torch.equal(masks(model), expected)
    with pytest.raises(ValueError, match="first scales"):
        second.load_state_dict(state | {"start": {}})


def test_nan_in_a_scale_that_trained_is_seen() -> None:
    model = prepared()
    optimizer = sgd(model, lr=0.0)
    sparsifier = Sparsifier(model, optimizer, target=0.5, steps=10)
    blocked_layers(model)[1].scale.data.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        sparsifier.finalize()


def test_the_net_still_depends_on_its_input_at_the_highest_target() -> None:
    model = prepared()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match=r"target: 0\.999 .*at most (0\.9\d+)") as refusal:
        Sparsifier(model, optimizer, target=0.999, of="params", steps=10)
    reachable = float(str(refusal.value).split("at most ")[1].split(":")[0])
    sparsifier = Sparsifier(model, optimizer, target=reachable - 0.001, of="params", steps=10)
    train(model, optimizer, 10)
    assert sparsifier.sparsity() == pytest.approx(reachable, abs=0.01)
    layers = {layer.name: layer for layer in blocked_layers(model)}
    assert layers["stem"].mask.any()
    assert layers["shortcut"].mask.any() or (layers["a"].mask.any() and layers["b"].mask.any())


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_a_target_that_was_not_refused_is_met_whatever_weights_become(factor: float) -> None:
    model = prepared()
    sparsifier = Sparsifier(model, sgd(model), target=0.985, of="params", steps=10)
    model.get_parameter("shortcut.weight").data.mul_(factor)
    sparsifier.finalize()
    assert sparsifier.sparsity() == pytest.approx(0.985, abs=0.0077)  # half of the dearest block


def test_macs_known_late_are_checked_at_the_first_step() -> None:
    model = prepared()
    optimizer = sgd(model)
    Sparsifier(model, optimizer, target=0.9999, of="macs", steps=10)
    with pytest.raises(ValueError, match="at most"):
        train(model, optimizer, 1)
    with pytest.raises(ValueError, match="at most"):
        Sparsifier(model, sgd(model), target=0.9999, of="macs", steps=10, example_inputs=X)


@pytest.mark.parametrize(("momentum", "divisor"), [(0.0, 1.0), (0.9, 0.1)])
def test_the_proximal_step_of_sgd_reads_lr_and_momentum(momentum: float, divisor: float) -> None:
    model = prepared()
    groups = fxdbsr.param_groups(model, 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=momentum)
    Sparsifier(model, optimizer, gamma=0.5)
    for lr in (0.02, 0.01):
        optimizer.param_groups[2]["lr"] = lr
        optimizer.step()
    expected = 1 - 0.5 * 0.03 / divisor
    for scale in fxdbsr.block_scales(model).values():
        torch.testing.assert_close(scale.detach(), torch.full_like(scale, expected))


def test_the_proximal_step_refuses_a_momentum_that_never_fades() -> None:
    model = prepared()
    optimizer = torch.optim.SGD(fxdbsr.param_groups(model, 0.0), lr=0.1, momentum=1.0)
    with pytest.raises(ValueError, match="expected a momentum below 1"):
        Sparsifier(model, optimizer, gamma=0.5, steps=10)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_the_proximal_step_of_other_optimizers_is_gamma_times_lr(kind: Any) -> None:
    model = prepared()
    optimizer = kind(fxdbsr.param_groups(model, 0.0), lr=0.1)
    Sparsifier(model, optimizer, gamma=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for scale in fxdbsr.block_scales(model).values():
        torch.testing.assert_close(scale.detach(), torch.full_like(scale, 0.95))


def test_example_inputs_that_fail_are_named_and_leave_the_positions() -> None:
    model = fxdbsr.prepare(nn.Sequential(nn.Conv2d(4, 4, 1)), 2)
    model(torch.randn(1, 4, 2, 3))
    with pytest.raises(ValueError, match="example_inputs: the forward of Sequential fails on them: "):
        fxdbsr.penalty(model, "macs", torch.randn(1, 3, 2, 2))
    assert fxdbsr.penalty(model, "macs").item() == 4 * 4 * 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fxdbsr.block_scales(None), "model: expected an nn.Module, got NoneType"),  # type: ignore[arg-type]
        (lambda: fxdbsr.param_groups(nn.Conv2d(3, 3, 1), "a"), "weight_decay: expected a number"),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_the_wrong_type_are_named(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_gamma_leaves_frozen_scales_alone() -> None:
    model = fxdbsr.prepare(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), 2)
    model.get_submodule("0").requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Sparsifier(model, optimizer, gamma=2.0)
    model(torch.zeros(1, 4, 2, 2)).sum().backward()
    optimizer.step()
    frozen, trained = fxdbsr.block_scales(model).values()
    assert bool((frozen == 1).all())
    assert bool((trained < 1).all())


def test_the_penalty_is_float32_so_that_a_loss_stays_so() -> None:
    model = fxdbsr.prepare(nn.Sequential(nn.Conv2d(4, 4, 1)), 2)
    assert fxdbsr.penalty(model, "params").dtype == torch.float32
    assert fxdbsr.penalty(model.bfloat16()).dtype == torch.float32


def test_gamma_makes_exact_zeros_that_finalize_masks() -> None:
    model = prepared()
    optimizer = sgd(model, lr=0.1)
    sparsifier = Sparsifier(model, optimizer, gamma=0.05)
    train(model, optimizer, 30)
    zeros = torch.cat([s.flatten() == 0 for s in fxdbsr.block_scales(model).values()])
    assert 0.2 < float(zeros.float().mean()) < 1
    assert masks(model).all()
    model.eval()
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    sparsifier.finalize()
    assert torch.equal(masks(model), ~zeros)
    assert torch.equal(model(x), before)
    assert sparsifier.sparsity() == pytest.approx(float(zeros.float().mean()))


def test_a_gamma_that_kills_everything_leaves_a_path() -> None:
    model = prepared()
    optimizer = sgd(model, lr=0.1)
    sparsifier = Sparsifier(model, optimizer, gamma=100.0)
    train(model, optimizer, 5)
    sparsifier.finalize()
    layers = {layer.name: int(layer.alive().sum()) for layer in blocked_layers(model)}
    assert layers["stem"] == 1
    assert layers["shortcut"] == 1 or layers["a"] == layers["b"] == 1


@pytest.mark.parametrize("options", [{"target": 0.9}, {"shrink": 100.0, "end": 0.4}])
def test_the_loss_makes_no_zeros_beside_the_mask_in_the_form_clamp(options: dict[str, Any]) -> None:
    model = prepared("clamp")
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, steps=10, **options)
    train(model, optimizer, 8)
    expected = sparsifier.sparsity()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for scale in fxdbsr.block_scales(model).values():
        scale.grad = torch.full_like(scale, 1000.0)
    optimizer.step()
    assert sparsifier.frozen
    assert sparsifier.sparsity() == pytest.approx(expected) == float((~masks(model)).float().mean())


@pytest.mark.parametrize("options", [{"target": 0.6, "of": "macs", "steps": 16}, {"gamma": 0.02}])
@pytest.mark.parametrize("cut", [1, 6, 14])
def test_a_resumed_run_ends_with_the_same_weights(options: dict[str, Any], cut: int) -> None:
    whole = prepared()
    optimizer = sgd(whole)
    Sparsifier(whole, optimizer, **options)
    train(whole, optimizer, 16)

    first = prepared()
    optimizer = sgd(first)
    sparsifier = Sparsifier(first, optimizer, **options)
    train(first, optimizer, cut)
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict(), sparsifier.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)

    second = fxdbsr.prepare(Net(), 4)
    optimizer = sgd(second)
    sparsifier = Sparsifier(second, optimizer, **options)
    for target, state in zip((second, optimizer, sparsifier), states, strict=True):
        target.load_state_dict(state)  # type: ignore[attr-defined]
    train(second, optimizer, 16 - cut, cut)
    assert all(torch.equal(t, second.state_dict()[name]) for name, t in whole.state_dict().items())


def test_states_of_another_kind_are_refused() -> None:
    model = prepared()
    sparsifier = Sparsifier(model, sgd(model), target=0.5, steps=10)
    good = sparsifier.state_dict()
    with pytest.raises(ValueError, match="without"):
        sparsifier.load_state_dict({"step": 3})
    with pytest.raises(ValueError, match="target"):
        sparsifier.load_state_dict(good | {"plan": good["plan"] | {"target": None, "gamma": 1.0}})
    with pytest.raises(ValueError, match="names"):
        sparsifier.load_state_dict(good | {"positions": {"other": [[1]]}})
    assert sparsifier.step == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"step": "3"}, "expected step of a Sparsifier, got '3'"),
        ({"frozen": "no"}, "expected frozen"),
        ({"plan": None}, "expected plan"),
        ({"positions": []}, "expected positions"),
        ({"b": [[1], [1]]}, "expected positions of 1 users of b, got "),
        ({"b": 3}, "expected positions of 1 users of b, got 3"),
        ({"b": [["a"]]}, "expected positions of 1 users of b, got "),
    ],
)
def test_a_state_that_is_not_sound_is_named_and_leaves_all_as_it_was(change: dict[str, Any], text: str) -> None:
    model = prepared()
    sparsifier = Sparsifier(model, sgd(model), target=0.5, of="macs", steps=10, example_inputs=X)
    before = copy.deepcopy(sparsifier.state_dict())
    positions = {name: [[7]] for name in before["positions"]}
    wrong = change if not set(change) & set(positions) else {"positions": positions | change}
    with pytest.raises(ValueError, match=re.escape(text)):
        sparsifier.load_state_dict(before | wrong)
    assert sparsifier.state_dict()["positions"] == before["positions"]


def test_removed_it_rides_no_more() -> None:
    model = prepared()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, target=0.5, steps=10)
    sparsifier.remove()
    train(model, optimizer, 10)
    assert sparsifier.step == 0
    assert masks(model).all()


def test_finalize_before_the_end_goes_to_the_target() -> None:
    model = prepared()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, target=0.5, steps=100)
    train(model, optimizer, 5)
    sparsifier.finalize()
    assert sparsifier.frozen
    assert sparsifier.sparsity() == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, ValueError, "exactly one of target and gamma"),
        ({"target": 0.5, "gamma": 0.1, "steps": 5}, ValueError, "exactly one of target and gamma"),
        ({"target": 0.5}, ValueError, "steps"),
        ({"target": 1.0, "steps": 5}, ValueError, "target"),
        ({"target": -0.1, "steps": 5}, ValueError, "target"),
        ({"target": math.nan, "steps": 5}, ValueError, "target"),
        ({"target": "0.5", "steps": 5}, TypeError, "target"),
        ({"target": 0.5, "steps": 0}, ValueError, "steps"),
        ({"target": 0.5, "steps": 2.5}, TypeError, "steps"),
        ({"target": 0.5, "steps": 5, "of": "flops"}, ValueError, "of: .*flops"),
        ({"target": 0.5, "steps": 5, "begin": 0.8}, ValueError, "begin"),
        ({"target": 0.5, "steps": 5, "interval": 0}, ValueError, "interval"),
        ({"gamma": -1.0}, ValueError, "gamma"),
        ({"gamma": math.nan}, ValueError, "gamma"),
        ({"gamma": math.inf}, ValueError, "gamma"),
        ({"gamma": "big"}, TypeError, "gamma"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], text: str) -> None:
    model = prepared()
    optimizer = sgd(model)
    with pytest.raises(error, match=text):
        Sparsifier(model, optimizer, **options)
    assert not optimizer._optimizer_step_post_hooks


def test_models_and_optimizers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="prepare"):
        Sparsifier(Net(), sgd(Net()), target=0.5, steps=5)
    with pytest.raises(ValueError, match="lacks 4 of 4 scales, the first of stem"):
        Sparsifier(prepared(), sgd(prepared()), target=0.5, steps=5)
    with pytest.raises(TypeError, match="optimizer"):
        Sparsifier(prepared(), "sgd", target=0.5, steps=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"target": 0.5, "steps": 10}, {"gamma": 0.1}])
def test_nan_is_reported_with_layer_and_step(options: dict[str, Any]) -> None:
    model = prepared()
    optimizer = sgd(model, lr=0.0)
    Sparsifier(model, optimizer, **options)
    train(model, optimizer, 3)
    optimizer.zero_grad(set_to_none=True)
    fxdbsr.block_scales(model)["b"].data[0, 0] = math.nan
    with pytest.raises(ValueError, match="step 4: b: "):
        optimizer.step()


def test_nan_in_a_weight_is_refused_at_the_start() -> None:
    model = prepared()
    model.get_parameter("b.weight").data[0, 0] = math.nan
    with pytest.raises(ValueError, match="b: its weight or its scale holds NaN"):
        Sparsifier(model, sgd(model), target=0.5, steps=5)


def test_steps_that_a_grad_scaler_skips_do_not_count() -> None:
    for fused in (False, True):
        model = prepared()
        optimizer = sgd(model, fused=fused)
        sparsifier = Sparsifier(model, optimizer, gamma=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        for factor in (1.0, math.inf, 1.0):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 3, 8, 8)).square().mean() * factor
            torch.autograd.backward(scaler.scale(loss))
            scaler.step(optimizer)
            scaler.update()
        assert sparsifier.step == 2


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}])
def test_every_implementation_of_the_optimizer_carries_it(options: dict[str, bool]) -> None:
    model = prepared()
    groups = fxdbsr.param_groups(model, 0.01)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, **options)  # type: ignore[arg-type]
    sparsifier = Sparsifier(model, optimizer, target=0.5, steps=10)
    train(model, optimizer, 10)
    assert sparsifier.sparsity() == pytest.approx(0.5, abs=0.005)


def test_a_compiled_model_trains_the_same_masks() -> None:
    plain, other = prepared(), prepared()
    compiled: Any = torch.compile(other, backend="aot_eager")
    for model in (plain, compiled):
        optimizer = sgd(model)
        sparsifier = Sparsifier(model, optimizer, target=0.5, of="macs", steps=8, example_inputs=X)
        train(model, optimizer, 8)
        assert sparsifier.sparsity() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(masks(plain), masks(other))


def test_macs_of_a_compiled_model_need_example_inputs() -> None:
    model: Any = torch.compile(prepared(), backend="aot_eager")
    optimizer = sgd(model)
    Sparsifier(model, optimizer, target=0.5, of="macs", steps=8)
    with pytest.raises(ValueError, match=r"stem: .*example_inputs"):
        train(model, optimizer, 1)


def test_a_distributed_wrapper_is_looked_through(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(prepared())
        optimizer = sgd(model)
        sparsifier = Sparsifier(model, optimizer, target=0.5, of="macs", steps=8)
        train(model, optimizer, 8)
        assert sparsifier.sparsity() == pytest.approx(0.5, abs=0.02)
        assert list(fxdbsr.block_scales(model)) == ["stem", "a", "b", "shortcut"]
    finally:
        torch.distributed.destroy_process_group()


def test_converted_it_computes_what_was_trained() -> None:
    model = prepared()
    optimizer = sgd(model)
    Sparsifier(model, optimizer, target=0.6, steps=10)
    train(model, optimizer, 10)
    x = torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(model).eval()(x)
    torch.testing.assert_close(fxdbsr.convert(model, backend="reference")(x), expected, rtol=1e-5, atol=1e-6)
