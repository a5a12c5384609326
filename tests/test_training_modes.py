"""The ways people train: forms, precisions, optimizers, accumulated gradients, compiled steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxdbsr
from fxdbsr.layers import blocked_layers
from fxdbsr.sparsifier import Sparsifier

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 12


class Net(nn.Module):
    """A conv module and a conv called as a function on a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(16, 16, 3, 3) / 12)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(F.conv2d(torch.relu(self.a(x)), self.kernel, stride=2))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


def prepared(form: str = "product") -> nn.Module:
    torch.manual_seed(0)
    return fxdbsr.prepare(Net(), 4, form=form)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 5


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x, y = batch(step)
    return F.cross_entropy(model(x.to(dtype)).float(), y)


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    groups = fxdbsr.param_groups(model, 1e-4)
    return torch.optim.SGD(groups, **({"lr": 0.05, "momentum": 0.9} | options))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype = torch.float32) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, step, dtype))
        optimizer.step()


def assert_met(sparsifier: Sparsifier, target: float) -> None:
    costs = torch.cat([c.flatten() for c in sparsifier._costs.of("macs")])
    assert sparsifier.sparsity("macs") == pytest.approx(target, abs=max(0.005, float(costs.max() / costs.sum()) / 2))


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-3),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3),
}


@pytest.mark.parametrize("form", ["product", "clamp", "mask"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_optimizer_and_form_meets_the_target(name: str, form: str) -> None:
    model = prepared(form)
    optimizer = OPTIMIZERS[name](fxdbsr.param_groups(model, 1e-4))
    sparsifier = Sparsifier(model, optimizer, target=0.55, of="macs", steps=STEPS)
    train(model, optimizer)
    assert_met(sparsifier, 0.55)


def test_scales_of_the_mask_form_stay_one_and_out_of_the_optimizer() -> None:
    model = prepared("mask")
    optimizer = sgd(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not any(id(scale) in held for scale in fxdbsr.block_scales(model).values())
    Sparsifier(model, optimizer, target=0.5, steps=STEPS)
    train(model, optimizer)
    assert all(bool((scale == 1).all()) for scale in fxdbsr.block_scales(model).values())
    x = batch(0)[0]
    torch.testing.assert_close(fxdbsr.convert(model, backend="reference")(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_the_mask_form_is_a_dense_net_with_zeros_kept_at_zero() -> None:
    model, dense = prepared("mask"), Net()
    dense.load_state_dict(model.state_dict(), strict=False)
    optimizers = [sgd(model), torch.optim.SGD(dense.parameters(), lr=0.05, momentum=0.9)]
    for net, optimizer in zip((model, dense), optimizers, strict=True):
        optimizer.param_groups[0]["weight_decay"] = 0.0
        train(net, optimizer)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in dense.named_parameters())


def test_the_penalty_needs_scales_that_are_trained() -> None:
    model = prepared("mask")
    with pytest.raises(ValueError, match="no trainable scale"):
        Sparsifier(model, sgd(model), gamma=0.1)


def test_accumulated_gradients_count_as_one_step() -> None:
    whole, parts = prepared(), prepared()
    steps: list[int] = []
    for model, pieces in ((whole, 1), (parts, 4)):
        optimizer = sgd(model)
        sparsifier = Sparsifier(model, optimizer, target=0.5, of="macs", steps=STEPS)
        for step in range(STEPS):
            x, y = batch(step)
            optimizer.zero_grad()
            for inputs, labels in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
                torch.autograd.backward(F.cross_entropy(model(inputs), labels) / pieces)
            optimizer.step()
        steps.append(sparsifier.step)
    assert steps[0] == steps[1]
    for one, other in zip(blocked_layers(whole), blocked_layers(parts), strict=True):
        assert torch.equal(one.mask, other.mask)
        torch.testing.assert_close(one.scale, other.scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_grad_scaler_leave_the_scales_float32(dtype: torch.dtype) -> None:
    model = prepared()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, target=0.5, of="macs", steps=STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype == torch.float16)
    for step in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(model, step)
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
    assert {scale.dtype for scale in fxdbsr.block_scales(model).values()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert_met(sparsifier, 0.5)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "to"])
def test_a_model_in_half_precision_keeps_its_scales_in_float32(cast: str) -> None:
    model = prepared()
    for scale in fxdbsr.block_scales(model).values():
        scale.data.fill_(1 - 2**-12)
    model = model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
    for layer in blocked_layers(model):
        assert layer.weight.dtype != torch.float32
        assert layer.scale.dtype == torch.float32
        assert bool((layer.scale == 1 - 2**-12).all())
    wider = prepared().double()
    assert {scale.dtype for scale in fxdbsr.block_scales(wider).values()} == {torch.float64}


def test_a_prepared_half_model_has_float32_scales() -> None:
    model = fxdbsr.prepare(Net().bfloat16(), 4)
    assert {scale.dtype for scale in fxdbsr.block_scales(model).values()} == {torch.float32}
    assert model(batch(0)[0].bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"target": 0.5, "of": "macs", "steps": STEPS}, {"gamma": 0.2}])
def test_a_bfloat16_model_trains_to_the_zeros(options: dict[str, Any]) -> None:
    model = prepared().bfloat16()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, **options)
    train(model, optimizer, torch.bfloat16)
    sparsifier.finalize()
    assert 0.1 < sparsifier.sparsity() < 1
    if "target" in options:
        assert_met(sparsifier, 0.5)
    x = batch(0)[0].bfloat16()
    expected = model.eval()(x).float()
    torch.testing.assert_close(fxdbsr.convert(model, backend="reference")(x).float(), expected, rtol=0.05, atol=0.05)


def test_small_steps_of_the_penalty_are_not_lost_in_bfloat16() -> None:
    model = prepared().bfloat16()
    optimizer = sgd(model, lr=0.01, momentum=0.0)
    Sparsifier(model, optimizer, gamma=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(100):
        optimizer.step()
    for scale in fxdbsr.block_scales(model).values():
        torch.testing.assert_close(scale.detach(), torch.full_like(scale, 0.99))


def test_a_model_that_moves_after_the_sparsifier_was_made_is_masked() -> None:
    model = prepared()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, target=0.5, steps=STEPS)
    before = [layer.mask for layer in blocked_layers(model)]
    model._apply(torch.clone)  # as .to(device) does: other buffers, the same parameters
    train(model, optimizer)
    assert all(bool(mask.all()) for mask in before)
    now = torch.cat([value.flatten() for name, value in model.state_dict().items() if name.endswith("mask")])
    assert float((~now).float().mean()) == sparsifier.sparsity() == pytest.approx(0.5, abs=0.03)


def test_one_compiled_graph_serves_the_whole_training() -> None:
    masks = []
    for compiled in (False, True):
        model = prepared()
        optimizer = sgd(model)
        sparsifier = Sparsifier(
            model, optimizer, target=0.5, of="macs", steps=STEPS, example_inputs=torch.zeros(1, 3, 8, 8)
        )
        graphs = CompileCounterWithBackend("aot_eager")

        def loss(x: Tensor, y: Tensor, model: nn.Module = model) -> Tensor:
            return F.cross_entropy(model(x), y)

        call = torch.compile(loss, fullgraph=True, backend=graphs) if compiled else loss
        seen = []
        for step in range(STEPS):
            optimizer.zero_grad()
            torch.autograd.backward(call(*batch(step)))
            optimizer.step()
            seen.append(sparsifier.sparsity())
        assert len(set(seen)) > 3
        assert graphs.frame_count == int(compiled)
        masks.append(torch.cat([layer.mask.flatten() for layer in blocked_layers(model)]))
    assert torch.equal(*masks)


def test_a_compiled_step_is_not_compiled_again_when_masks_change() -> None:
    model = prepared()
    optimizer = sgd(model)
    sparsifier = Sparsifier(
        model, optimizer, target=0.5, of="macs", steps=STEPS, example_inputs=torch.zeros(1, 3, 8, 8)
    )
    graphs = CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        torch.autograd.backward(loss)
        optimizer.step()

    compiled = torch.compile(step, backend=graphs)
    counts = []
    for number in range(STEPS):
        compiled(*batch(number))
        counts.append(graphs.frame_count)
    assert counts[2:] == counts[1:-1]
    assert sparsifier.frozen
    assert_met(sparsifier, 0.5)
