"""With a target, scales stand still until blocks go: until then a prepared model trains as the dense one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import fxdbsr
from fxdbsr.layers import blocked_layers

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, BEGIN = 20, 0.5
FIRST = 10  # the step from which on scales learn

OPTIMIZERS: dict[str, Callable[[list[dict[str, object]]], Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "plain sgd": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
    "adamw, fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.001, momentum=0.9),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)
    return nn.Sequential(*layers)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    return F.cross_entropy(model(x), torch.arange(8) % 5)


def train(model: nn.Module, optimizer: Optimizer, steps: range, closure: bool = False) -> None:
    def compute(step: int) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        torch.autograd.backward(loss)
        return loss

    for step in steps:
        if closure:
            optimizer.step(partial(compute, step))  # type: ignore[arg-type]
        else:
            compute(step)
            optimizer.step()


def make(kind: str, form: str = "product") -> tuple[nn.Module, Optimizer, fxdbsr.Sparsifier]:
    model = fxdbsr.prepare(net(), 4, form=form)
    optimizer = OPTIMIZERS[kind](fxdbsr.param_groups(model, 1e-4))
    options = {"steps": STEPS, "begin": BEGIN, "end": 0.9}
    return model, optimizer, fxdbsr.Sparsifier(model, optimizer, target=0.5, **options)  # type: ignore[arg-type]


def scales(model: nn.Module) -> Tensor:
    return torch.cat([layer.scale.detach().flatten() for layer in blocked_layers(model)])


@pytest.mark.parametrize("closure", [False, True], ids=["", "closure"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_until_begin_a_model_trains_as_one_without_scales_and_then_they_learn(kind: str, closure: bool) -> None:
    model, optimizer, _ = make(kind)
    train(model, optimizer, range(FIRST - 1), closure)
    assert torch.equal(scales(model), torch.ones_like(scales(model)))
    other, its_optimizer, _ = make(kind, "mask")
    train(other, its_optimizer, range(FIRST - 1), closure)
    for mine, its in zip(blocked_layers(model), blocked_layers(other), strict=True):
        assert torch.equal(mine.weight, its.weight)
    train(model, optimizer, range(FIRST - 1, FIRST), closure)
    assert not torch.equal(scales(model), torch.ones_like(scales(model)))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_first_step_of_scales_is_that_of_a_fresh_optimizer(kind: str) -> None:
    model, optimizer, _ = make(kind)
    train(model, optimizer, range(FIRST - 1))
    twin = copy.deepcopy(model)
    fresh = OPTIMIZERS[kind](fxdbsr.param_groups(twin, 1e-4))
    train(model, optimizer, range(FIRST - 1, FIRST))
    train(twin, fresh, range(FIRST - 1, FIRST))
    torch.testing.assert_close(scales(model), scales(twin))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_run_resumed_before_begin_ends_as_one_that_ran_through(kind: str) -> None:
    model, optimizer, _ = make(kind)
    train(model, optimizer, range(STEPS))
    cut, its_optimizer, sparsifier = make(kind)
    train(cut, its_optimizer, range(5))
    states = copy.deepcopy((cut.state_dict(), its_optimizer.state_dict(), sparsifier.state_dict()))
    resumed, its_optimizer, sparsifier = make(kind)
    resumed.load_state_dict(states[0])
    its_optimizer.load_state_dict(states[1])
    sparsifier.load_state_dict(states[2])
    train(resumed, its_optimizer, range(5, STEPS))
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_scales_set_by_hand_before_begin_stay_as_they_were_set() -> None:
    model, optimizer, _ = make("sgd")
    train(model, optimizer, range(3))
    with torch.no_grad():
        for layer in blocked_layers(model):
            layer.scale.fill_(0.5)
    train(model, optimizer, range(3, 6))
    assert torch.equal(scales(model), torch.full_like(scales(model), 0.5))


def test_without_a_target_scales_learn_from_the_first_step() -> None:
    model = fxdbsr.prepare(net(), 4)
    optimizer = OPTIMIZERS["sgd"](fxdbsr.param_groups(model, 1e-4))
    fxdbsr.Sparsifier(model, optimizer, shrink=2.0, steps=STEPS, begin=BEGIN)
    train(model, optimizer, range(1))
    assert not torch.equal(scales(model), torch.ones_like(scales(model)))


def test_a_removed_sparsifier_lets_scales_learn() -> None:
    model, optimizer, sparsifier = make("sgd")
    train(model, optimizer, range(2))
    sparsifier.remove()
    train(model, optimizer, range(2, 3))
    assert not torch.equal(scales(model), torch.ones_like(scales(model)))
