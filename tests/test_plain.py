"""Which calls may take a kernel that only knows tensors: those that nobody watches."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fxdbsr.kernels.plain import is_plain, runs_triton


class Asked(nn.Module):
    """Notes the answer at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        """`x` doubled."""
        self.answers.append(is_plain(x))
        return x + x


@torch.no_grad()
def test_a_call_without_gradients_is_plain() -> None:
    x = torch.zeros(2, 3)
    assert is_plain(x)
    assert is_plain(x, None, torch.zeros(3, requires_grad=True))


def test_gradients_are_watched_where_something_learns() -> None:
    x, weight = torch.zeros(2, 3), torch.zeros(3, requires_grad=True)
    assert is_plain(x, None)
    assert not is_plain(x, weight)
    assert not is_plain(x, None, weight)
    with torch.inference_mode():
        assert is_plain(x, weight)


def test_a_batch_without_images_is_not_plain() -> None:
    assert not is_plain(torch.zeros(0, 3))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_torch_jit_trace_is_watched() -> None:
    model, x = Asked(), torch.zeros(2, 3)
    model(x)
    torch.jit.trace(model, x, check_trace=False)
    assert model.answers == [True, False]


def test_torch_fx_is_watched() -> None:
    model = Asked()
    fx.symbolic_trace(model)
    assert model.answers == [False]


def test_torch_compile_is_watched() -> None:
    def answer(x: Tensor) -> Tensor:
        return x + 1 if is_plain(x) else x - 1

    x = torch.zeros(2, 3)
    assert (answer(x) == 1).all()
    assert (torch.compile(answer, backend="eager", fullgraph=True)(x) == -1).all()


def test_torch_export_is_watched() -> None:
    class Answer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if is_plain(x) else x - 1

    x = torch.zeros(2, 3)
    assert (torch.export.export(Answer(), (x,)).module()(x) == -1).all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own call
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.vmap(f)(x),
        lambda f, x: torch.func.grad(lambda t: f(t).sum())(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.functionalize(f)(x),
    ],
    ids=["vmap", "grad", "jvp", "functionalize"],
)
@torch.no_grad()
def test_transforms_of_functions_are_watched(transform: Any) -> None:
    model, x = Asked(), torch.zeros(2, 3)
    transform(model, x)
    assert model.answers == [False]
    assert is_plain(x)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own call
def test_forward_mode_gradients_are_watched() -> None:
    x = torch.zeros(2, 3)
    with forward_ad.dual_level():
        assert not is_plain(forward_ad.make_dual(x, torch.ones(2, 3)))
    assert is_plain(x)


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [lambda: FlopCounterMode(display=False), Nothing], ids=["flop counter", "own"])
@torch.no_grad()
def test_modes_that_see_operators_are_watched(mode: Any) -> None:
    x = torch.zeros(2, 3)
    with mode():
        assert not is_plain(x)
    assert is_plain(x)


def test_triton_runs_on_no_cpu() -> None:
    assert not runs_triton(torch.device("cpu"))
    assert not runs_triton(torch.device("meta"))


@pytest.mark.parametrize(
    ("capability", "hip", "expected"), [((7, 5), None, False), ((8, 0), None, True), ((9, 0), "6.2", False)], ids=str
)
def test_triton_runs_on_nvidia_from_8_0_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, expected: bool
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert runs_triton.__wrapped__(torch.device("cuda")) is expected


def test_without_triton_nothing_of_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not runs_triton.__wrapped__(torch.device("cuda"))
