"""to_dense: ordinary layers, dead channels gone, and an ONNX export that computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import fxdbsr
from bench.coverage import BOUND, build, enliven
from bench.small_net import SmallNet, sparse
from fxdbsr.layers import blocked_layers


def chain() -> nn.Sequential:
    """Convs whose dead channels nothing holds."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def without_rows(model: nn.Module) -> nn.Module:
    """`model` prepared, every second row of its blocks off, and the statistics of its norms random."""
    prepared = fxdbsr.prepare(model, 8)
    for layer in blocked_layers(prepared):
        layer.mask[1::2] = False
    enliven(prepared, torch.randn(4, 3, 12, 12), torch.Generator().manual_seed(0))
    return prepared.eval()


@pytest.mark.parametrize("converted", [False, True], ids=["prepared", "converted"])
def test_dead_channels_are_gone(converted: bool) -> None:
    prepared, x = without_rows(chain()), torch.randn(2, 3, 12, 12)
    dense = fxdbsr.to_dense(fxdbsr.convert(prepared) if converted else prepared)
    with torch.no_grad():
        expected = prepared(x)
        assert (dense(x) - expected).abs().max() <= BOUND * expected.abs().max()
    shapes = {name: tuple(p.shape) for name, p in dense.named_parameters() if p.dim() > 1}
    convs = {"0.weight": (16, 3, 3, 3), "3.weight": (16, 16, 3, 3), "5.weight": (8, 16, 1, 1)}
    assert shapes == convs | {"8.weight": (5, 8)}
    assert {type(m) for m in dense.modules()} - {type(dense)} <= {type(m) for m in chain().modules()}
    assert any(isinstance(m, nn.BatchNorm2d) for m in dense.modules()) != converted


def test_the_dense_model_trains_on() -> None:
    dense = fxdbsr.to_dense(fxdbsr.convert(without_rows(chain()))).train()
    dense(torch.randn(2, 3, 12, 12)).sum().backward()
    assert all(p.grad is not None for p in dense.parameters())


@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("name", ["everything", "resnet18"])
@pytest.mark.parametrize("converted", [False, True], ids=["prepared", "converted"])
def test_onnxruntime_computes_the_same_at_other_sizes(name: str, converted: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, size = (SmallNet(), 12) if name == "everything" else (build(name), 64)
    x = torch.randn(2, 3, size, size + 4)
    prepared = sparse(model, x, 8)
    dense = fxdbsr.to_dense(fxdbsr.convert(prepared) if converted else prepared)
    shapes = ({0: Dim("batch"), 2: Dim.AUTO, 3: Dim.AUTO},)
    path = tmp_path / "model.onnx"
    torch.onnx.export(dense, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for y in (x, torch.randn(3, 3, size + 8, 2 * size)):
        with torch.no_grad():
            expected = prepared(y)
        (found,) = session.run(None, {session.get_inputs()[0].name: y.numpy()})
        assert (torch.from_numpy(found) - expected).abs().max() <= BOUND * expected.abs().max()


def test_errors_are_clear() -> None:
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        fxdbsr.to_dense(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a prepared or converted model, got Sequential"):
        fxdbsr.to_dense(chain())
    prepared = fxdbsr.prepare(chain(), 8)
    prepared.get_parameter("3.weight").data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"3\.weight: 9 of"):
        fxdbsr.to_dense(prepared)
