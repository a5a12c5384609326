"""How far the penalty moves scales: told in advance from the schedule, and what then happens."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import LRScheduler

import fxdbsr
from fxdbsr.sparsifier import Sparsifier

STEPS = 12


def prepared(form: str = "product") -> nn.Module:
    return fxdbsr.prepare(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)), 4, form=form)


def sgd(model: nn.Module, **options: Any) -> SGD:
    return SGD(fxdbsr.param_groups(model, 0.0), **({"lr": 0.1, "momentum": 0.5} | options))


def still_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, schedule: LRScheduler | None) -> None:
    """Steps with gradients of zero, so that only the penalty moves the scales."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(steps):
        optimizer.step()
        if schedule is not None:
            schedule.step()


def moved(model: nn.Module) -> float:
    (value,) = {float(1 - v) for scale in fxdbsr.block_scales(model).values() for v in scale.detach().flatten()}
    return value


@pytest.mark.parametrize(
    "make",
    [
        lambda o: schedulers.LambdaLR(o, lambda step: (step + 1) / STEPS),
        lambda o: schedulers.CosineAnnealingLR(o, STEPS),
        lambda o: schedulers.OneCycleLR(o, 0.2, STEPS),
        lambda o: schedulers.MultiStepLR(o, [4, 8]),
        lambda o: schedulers.SequentialLR(
            o, [schedulers.LinearLR(o, 0.1, 1.0, 4), schedulers.CosineAnnealingLR(o, STEPS - 4)], [4]
        ),
        lambda o: schedulers.ChainedScheduler([schedulers.LinearLR(o, 0.1, 1.0, 4), schedulers.ExponentialLR(o, 0.9)]),
    ],
)
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_the_travel_told_in_advance_is_the_travel_that_happens(make: Any, kind: Any) -> None:
    model = prepared()
    options = {"momentum": 0.5, "dampening": 0.1} if kind is SGD else {}
    optimizer = kind(fxdbsr.param_groups(model, 0.0), lr=0.1, **options)
    schedule = make(optimizer)
    before = [dict(group, params=None) for group in optimizer.param_groups]
    state = {key: value for key, value in schedule.state_dict().items() if isinstance(value, int | float)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsifier = Sparsifier(model, optimizer, gamma=0.1, steps=STEPS, lr_schedule=schedule)
    assert [dict(group, params=None) for group in optimizer.param_groups] == before
    assert {k: schedule.state_dict()[k] for k in state} == state
    told = sparsifier.travel
    assert told is not None
    still_steps(model, optimizer, STEPS, schedule)
    assert told > 0
    assert moved(model) == pytest.approx(told, rel=1e-4)
    assert sparsifier.travelled == pytest.approx(told, rel=1e-6)


def test_a_list_of_learning_rates_tells_steps_and_travel() -> None:
    model = prepared()
    with pytest.warns(UserWarning, match=r"moves scales by 0\.36 in all of 3 steps"):
        sparsifier = Sparsifier(model, sgd(model), gamma=0.3, lr_schedule=[0.1, 0.2, 0.3])
    assert sparsifier.plan.steps == 3
    assert sparsifier.travel == pytest.approx(0.3 * 0.6 / 0.5)


@pytest.mark.parametrize(
    ("schedule", "error", "text"),
    [
        (3, TypeError, "lr_schedule: expected a torch scheduler or the learning rate of every step, got 3"),
        ([0.1, "x", 0.1], TypeError, "lr_schedule: expected a torch scheduler"),
        ([0.1, 0.1], ValueError, "lr_schedule: expected the learning rates of 3 steps, got 2"),
    ],
)
def test_what_is_no_schedule_of_all_steps_is_refused(schedule: Any, error: type[Exception], text: str) -> None:
    model = prepared()
    optimizer = sgd(model)
    with pytest.raises(error, match=text):
        Sparsifier(model, optimizer, gamma=10.0, steps=3, lr_schedule=schedule)
    assert not optimizer._optimizer_step_post_hooks


def test_a_constant_learning_rate_is_a_schedule() -> None:
    model = prepared()
    assert Sparsifier(model, sgd(model), gamma=1.0, steps=10).travel == pytest.approx(2.0)


def test_an_unknown_schedule_tells_nothing_and_warns_of_nothing() -> None:
    model = prepared()
    optimizer = sgd(model)
    assert Sparsifier(model, optimizer, gamma=1e-6).travel is None
    plateau = schedulers.ReduceLROnPlateau(optimizer)
    assert Sparsifier(model, optimizer, gamma=1e-6, steps=9, lr_schedule=plateau).travel is None
    schedulers.LambdaLR(optimizer, lambda step: 1.0)
    assert Sparsifier(model, optimizer, gamma=1e-6, steps=9).travel is None


@pytest.mark.parametrize("lr", [1e-3, 0.3])
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_shrink_is_the_travel_whatever_the_learning_rate(kind: Any, lr: float) -> None:
    model = prepared()
    optimizer = kind(fxdbsr.param_groups(model, 0.0), lr=lr)
    with pytest.warns(UserWarning, match=r"moves scales by 0\.6 "):
        sparsifier = Sparsifier(model, optimizer, shrink=0.6, steps=STEPS, begin=0.25, end=0.75)
    schedule = schedulers.CosineAnnealingLR(optimizer, STEPS)
    still_steps(model, optimizer, 2, schedule)
    assert moved(model) == 0
    still_steps(model, optimizer, STEPS - 2, schedule)
    assert moved(model) == pytest.approx(0.6, rel=1e-5)
    assert sparsifier.travelled == pytest.approx(0.6)
    assert sparsifier.frozen


def test_a_shrink_past_one_masks_every_block_that_nothing_holds() -> None:
    model = prepared()
    optimizer = sgd(model, lr=1e-6)
    sparsifier = Sparsifier(model, optimizer, shrink=1.5, steps=STEPS)
    still_steps(model, optimizer, STEPS, None)
    assert sparsifier.frozen
    assert sparsifier.sparsity() == pytest.approx(1 - 2 / 6)


def test_cost_weights_shrink_a_layer_faster() -> None:
    model = prepared()
    optimizer = sgd(model)
    Sparsifier(model, optimizer, gamma=0.5, cost_weights={"1": 3.0})
    still_steps(model, optimizer, 2, None)
    first, second = (float(scale.detach().mean()) for scale in fxdbsr.block_scales(model).values())
    assert 1 - first == pytest.approx(0.2)
    assert 1 - second == pytest.approx(0.6)


def test_scales_of_the_clamp_form_are_not_bounded() -> None:
    model = prepared("clamp")
    optimizer = sgd(model)
    Sparsifier(model, optimizer, gamma=0.5)
    scale = fxdbsr.block_scales(model)["0"]
    scale.data.copy_(torch.tensor([[2.0], [-0.25]]))
    still_steps(model, optimizer, 1, None)
    torch.testing.assert_close(scale.detach(), torch.tensor([[1.9], [-0.15]]))
    still_steps(model, optimizer, 2, None)
    torch.testing.assert_close(scale.detach(), torch.tensor([[1.7], [0.0]]))


def test_a_gamma_of_zero_moves_nothing() -> None:
    model = prepared()
    optimizer = sgd(model)
    Sparsifier(model, optimizer, gamma=0.0)
    fxdbsr.block_scales(model)["0"].data.fill_(1.5)
    still_steps(model, optimizer, 2, None)
    assert moved_to(model, "0") == 1.5


def moved_to(model: nn.Module, name: str) -> float:
    return float(fxdbsr.block_scales(model)[name].detach().flatten()[0])


def test_a_resumed_sparsifier_knows_how_far_it_went() -> None:
    model = prepared()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, gamma=1.0, steps=10)
    still_steps(model, optimizer, 3, None)
    state = sparsifier.state_dict()
    sparsifier.remove()
    again = Sparsifier(model, optimizer, gamma=2.0, steps=10)
    again.load_state_dict(state)
    assert again.travelled == sparsifier.travelled
    assert again.plan.gamma == 1.0
    still_steps(model, optimizer, 1, None)
    assert again.travelled == pytest.approx(0.8)
    assert math.isclose(moved(model), 0.8, rel_tol=1e-6)
