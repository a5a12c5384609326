"""torch's own conv with its epilogue: which kernels are called, and that they compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fxdbsr.kernels import dense
from tests.gpu_stand_in import on_a_gpu

CUDA = torch.device("cuda")
GEOMETRY = ((1, 1), (1, 1), (1, 1), 1)


def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 8, 5, 5), torch.randn(6, 8, 3, 3), torch.randn(6), torch.randn(2, 6, 5, 5)


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("shape", [None, (2, 6, 5, 5), (6, 1, 1)], ids=str)
def test_the_cpu_runs_conv_add_and_activation(activation: str, shape: tuple[int, ...] | None) -> None:
    x, w, b, _ = tensors()
    residual = None if shape is None else torch.randn(shape)
    y = dense.conv(x, w, b, residual, *GEOMETRY, activation, 0.0)
    expected = F.conv2d(x, w, b, padding=1)
    expected = expected if residual is None else expected + residual
    functions = {"none": lambda t: t, "relu": F.relu, "silu": F.silu}
    torch.testing.assert_close(y, functions[activation](expected))


@pytest.mark.parametrize(
    ("device", "dtype", "axes", "groups", "activation", "reason"),
    [
        (torch.device("cpu"), torch.float32, 2, 1, "relu", "not for cpu"),
        (CUDA, torch.float32, 2, 1, "silu", "ReLU, not silu"),
        (CUDA, torch.float32, 3, 1, "relu", "3 axes"),
        (CUDA, torch.float32, 2, 32, "relu", "32 groups"),
        (CUDA, torch.bfloat16, 2, 1, "relu", "not bfloat16"),
    ],
)
def test_what_cudnn_does_not_fuse_is_a_sentence(
    device: torch.device, dtype: torch.dtype, axes: int, groups: int, activation: str, reason: str
) -> None:
    assert reason in str(dense.why_unfused(device, dtype, axes, groups, activation))


def calls(monkeypatch: pytest.MonkeyPatch, residual: Tensor | None, **changes: Any) -> list[str]:
    """Names of cuDNN's fused convs that a call on a GPU would make."""
    made: list[str] = []

    def fused(name: str) -> Any:
        def call(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
            made.append(name)
            return torch.empty(0)

        return call

    monkeypatch.setattr(dense, "why_unfused", lambda *_: None)
    for name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
        monkeypatch.setattr(torch, name, fused(name))
    x, w, b, _ = tensors()
    with changes.get("mode", torch.inference_mode()):
        dense.conv(on_a_gpu(changes.get("x", x)), changes.get("w", w), b, residual, *GEOMETRY, "relu", 0.0)
    return made


def test_relu_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls(monkeypatch, None) == ["cudnn_convolution_relu"]


def test_add_and_relu_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls(monkeypatch, tensors()[3]) == ["cudnn_convolution_add_relu"]


def test_a_residual_that_broadcasts_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls(monkeypatch, torch.randn(6, 1, 1)) == []


def test_an_empty_batch_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls(monkeypatch, None, x=torch.randn(0, 8, 5, 5)) == []


def test_a_residual_of_another_dtype_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls(monkeypatch, tensors()[3].double()) == []


def test_a_weight_that_learns_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls(monkeypatch, None, w=tensors()[1].requires_grad_(), mode=torch.enable_grad()) == []


def test_operators_that_are_counted_are_plain_convs(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = FlopCounterMode(display=False)
    assert calls(monkeypatch, None, mode=counter) == []
    assert counter.get_total_flops() == 2 * 2 * 5 * 5 * 6 * 8 * 9


@pytest.mark.parametrize("with_residual", [False, True])
def test_where_cudnn_has_no_fused_kernel_the_plain_conv_runs(
    monkeypatch: pytest.MonkeyPatch, with_residual: bool
) -> None:
    asked = []

    def unable(*_: Any) -> Tensor:
        asked.append(1)
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    monkeypatch.setattr(dense, "why_unfused", lambda *_: None)
    monkeypatch.setattr(dense, "_UNABLE", set())
    monkeypatch.setattr(torch, "cudnn_convolution_relu", unable)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", unable)
    x, w, b, r = tensors()
    residual = r if with_residual else None
    for _ in range(2):
        y = dense.conv(on_a_gpu(x), w, b, residual, *GEOMETRY, "relu", 0.0)
        torch.testing.assert_close(y, F.relu(F.conv2d(x, w, b, padding=1) + (r if with_residual else 0)))
    assert len(asked) == 1  # nobody asks again what is known


def test_running_out_of_memory_is_not_taken_for_a_missing_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(dense, "why_unfused", lambda *_: None)
    monkeypatch.setattr(dense, "_UNABLE", set())
    monkeypatch.setattr(torch, "cudnn_convolution_relu", full)
    x, w, b, _ = tensors()
    with pytest.raises(torch.OutOfMemoryError):
        dense.conv(on_a_gpu(x), w, b, None, *GEOMETRY, "relu", 0.0)
    assert not dense._UNABLE


def test_gradients_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "why_unfused", lambda *_: None)
    x, w, b, residual = tensors()
    x.requires_grad_()
    dense.conv(on_a_gpu(x), w, b, residual, *GEOMETRY, "relu", 0.0).sum().backward()
    assert x.grad is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", dense.FUSED_DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_fused_convs_compute_the_same(dtype: torch.dtype, with_residual: bool) -> None:
    torch.manual_seed(0)
    x, w, r = (torch.randn(s, device=CUDA, dtype=dtype) for s in ((8, 64, 14, 14), (96, 64, 3, 3), (8, 96, 14, 14)))
    b = torch.randn(96, device=CUDA, dtype=dtype)
    x, w, r = (t.contiguous(memory_format=torch.channels_last) for t in (x, w / 24, r))
    residual = r if with_residual else None
    with torch.inference_mode():
        y = dense.conv(x, w, b, residual, *GEOMETRY, "relu", 0.0)
        exact = F.conv2d(x.double(), w.double(), b.double(), padding=1) + (r.double() if with_residual else 0)
    torch.testing.assert_close(y.double(), F.relu(exact), rtol=2e-2, atol=2e-2)
