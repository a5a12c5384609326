"""Models that other tools pruned, with the real tools: convert drops exactly the blocks that they left zero."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import Tensor, nn
from torch.ao.pruning.sparsifier.weight_norm_sparsifier import WeightNormSparsifier
from torch.nn.utils import parametrizations, prune

import fxdbsr
from bench.coverage import BOUND
from fxdbsr.nn.packed import PackedConv


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    ).eval()


def checked(model: nn.Module, size: Any = (8, 8), backend: str = "reference") -> fxdbsr.Report:
    """The report of `model` converted, its outputs equal."""
    x = torch.randn(2, 3, 10, 10)
    training = model.training
    with torch.no_grad():
        expected = model.eval()(x)
        model.train(training)
        converted = fxdbsr.convert(model, block_size=size, backend=backend)
        assert (converted(x) - expected).abs().max() <= BOUND * expected.abs().max()
    return fxdbsr.report(converted, x)


def kept(report: fxdbsr.Report) -> dict[str, int]:
    return {row.name: row.blocks_kept for row in report.rows if row.name in ("0", "3", "5")}


def zero_blocks(weight: Tensor, share: float) -> None:
    """Zero a random share of the blocks of 8x8."""
    off = torch.rand(weight.shape[0] // 8, weight.shape[1] // 8) < share
    with torch.no_grad():
        weight[off.repeat_interleave(8, 0).repeat_interleave(8, 1)] = 0


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_plain_zeroed_weights(backend: str) -> None:
    model = net()
    zero_blocks(model.get_parameter("3.weight"), 0.5)
    alive = int(model.get_parameter("3.weight").view(4, 8, 4, 8, 9).abs().sum((1, 3, 4)).count_nonzero())
    assert 0 < alive < 16
    assert kept(checked(model, backend=backend))["3"] == alive


@pytest.mark.parametrize("removed", [False, True], ids=["hooks on", "removed"])
@pytest.mark.parametrize("training", [False, True])
def test_torch_prune_structured_and_unstructured(removed: bool, training: bool) -> None:
    model = net()
    prune.ln_structured(model[0], "weight", amount=0.5, n=2, dim=0)
    prune.ln_structured(model[3], "weight", amount=0.25, n=2, dim=0)
    prune.ln_structured(model[3], "weight", amount=0.25, n=2, dim=1)  # two in a row make a container
    prune.random_unstructured(model[5], "weight", amount=0.5)
    prune.l1_unstructured(model[5], "bias", amount=4)
    zeros = [int(model[i].weight.eq(0).sum()) for i in (0, 3, 5)]  # type: ignore[operator]
    assert all(zeros)
    if removed:
        for i, name in ((0, "weight"), (3, "weight"), (5, "weight"), (5, "bias")):
            prune.remove(model[i], name)
    model.train(training)
    report = checked(model, (1, 1))
    rows = {row.name: row for row in report.rows}
    assert rows["0"].blocks_kept <= 16 * 3
    assert rows["3"].blocks_kept <= 24 * 24
    assert rows["5"].blocks_kept <= 16 * 32 - zeros[2]


def test_torch_prune_by_a_custom_block_mask() -> None:
    model = net()
    mask = torch.ones(32, 32, 3, 3)
    mask[:8, 8:16] = mask[24:, :8] = 0
    prune.custom_from_mask(model[3], "weight", mask)
    assert kept(checked(model))["3"] == 14


def sparsified(layer: nn.Linear, shape: tuple[int, int], squash: bool) -> nn.Sequential:
    """A model of `layer` with half of its blocks of `shape` zeroed by torch.ao's sparsifier."""
    model = nn.Sequential(layer)
    sparsifier = WeightNormSparsifier(0.5, sparse_block_shape=shape, zeros_per_block=shape[0] * shape[1])
    sparsifier.prepare(model, config=[{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    if squash:
        sparsifier.squash_mask()
    return model


@pytest.mark.parametrize("squash", [False, True], ids=["parametrized", "squashed"])
def test_weight_norm_sparsifier_on_linear_layers(squash: bool) -> None:
    model = net()
    model[8] = sparsified(nn.Linear(16, 4), (4, 4), squash)[0]
    weight = model[8].weight  # a parameter, or what a parametrization gives
    assert isinstance(weight, Tensor)
    assert int(weight.eq(0).sum()) == 32
    zero_blocks(model.get_parameter("3.weight"), 0.5)
    converted = fxdbsr.convert(model, block_size=8)
    layer = converted.get_submodule("8")
    assert type(layer) is nn.Linear
    assert layer.in_features == 8, "inputs under blocks of zeros leave the layer"
    assert next(row for row in checked(model).rows if row.name == "5").blocks_kept == 4


@pytest.mark.parametrize("size", [(8, 8), (4, 16), (1, 8)])
def test_weight_norm_sparsifier_on_convs(size: tuple[int, int]) -> None:
    # it takes two axes: a conv's weight as [O, I * taps], where a block of ours is BO x (BC * taps)
    model = net()
    weight, flat = model.get_parameter("3.weight"), nn.Linear(32 * 9, 32)
    with torch.no_grad():
        flat.weight.copy_(weight.flatten(1))
        sparse = sparsified(flat, (size[0], size[1] * 9), True)
        weight.copy_(sparse.get_parameter("0.weight").view_as(weight))
    row = next(row for row in checked(model, size).rows if row.name == "3")
    assert row.blocks_total == 32 * 32 // (size[0] * size[1])
    assert row.blocks_kept <= row.blocks_total // 2
    assert row.blocks_kept > row.blocks_total // 4


@pytest.mark.filterwarnings("ignore")
def test_torch_prunings_output() -> None:
    model = net()
    x = torch.randn(1, 3, 10, 10)
    pruner = tp.pruner.MagnitudePruner(
        model, x, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.4, ignored_layers=[model[8]]
    )
    pruner.step()
    assert len(model.get_parameter("0.weight")) == 19
    zero = model.get_parameter("3.weight")
    with torch.no_grad():
        zero[8:16, 8:16] = 0
    report = checked(model)
    assert {row.name: row.weight_shape for row in report.rows}["3"] == (19, 19, 3, 3)
    assert kept(report) == {"0": 3, "3": 8, "5": 6}


@pytest.mark.filterwarnings("ignore")
def test_torch_prunings_output_of_a_resnet() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    pruner = tp.pruner.MagnitudePruner(
        model, x, importance=tp.importance.MagnitudeImportance(), pruning_ratio=0.3, ignored_layers=[model.fc]
    )
    pruner.step()
    with torch.no_grad():
        expected = model(x)
        converted = fxdbsr.convert(model, block_size=(32, 32))
        assert (converted(x) - expected).abs().max() <= BOUND * expected.abs().max()
        prepared = fxdbsr.prepare(model, (32, 32))
        assert torch.equal(prepared.eval()(x), expected)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_other_parametrizations_become_plain_weights(wrap: Any) -> None:
    model = net()
    wrap(model[3])
    report = checked(model.train())
    assert next(row for row in report.rows if row.name == "3").kernel == "reference"


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.l1_unstructured(layer, "scale", 0.5),
        parametrizations.weight_norm,
    ],
)
@torch.no_grad()
def test_blocked_layers_that_were_changed_after_prepare_convert(change: Any) -> None:
    prepared, x = fxdbsr.prepare(net(), 8), torch.randn(2, 3, 10, 10)
    change(prepared.get_submodule("3"))
    prepared.eval()
    expected = prepared(x)
    for found in (fxdbsr.convert(prepared, backend="reference"), fxdbsr.to_dense(prepared)):
        assert (found(x) - expected).abs().max() <= BOUND * expected.abs().max()
    assert torch.equal(prepared(x), expected)


def test_the_pruned_model_itself_stays_as_it_was() -> None:
    model = net()
    prune.ln_structured(model[0], "weight", amount=0.5, n=2, dim=0)
    parametrizations.spectral_norm(model[3])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fxdbsr.convert(model, block_size=8)
    assert prune.is_pruned(model[0])
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_refused_conversion_in_place_leaves_the_pruning_in_place() -> None:
    model = net()
    prune.ln_structured(model[0], "weight", amount=0.5, n=2, dim=0)
    parametrizations.spectral_norm(model[3])
    model.get_buffer("1.running_var")[0] = torch.nan
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"1\.running_var"):
        fxdbsr.convert(model, block_size=8, inplace=True)
    assert prune.is_pruned(model[0])
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0, equal_nan=True)


def test_hooks_of_others_stay_and_run() -> None:
    model = net()
    calls: list[int] = []
    prune.ln_structured(model[3], "weight", amount=0.5, n=2, dim=0)
    model[3].register_forward_pre_hook(lambda module, args: calls.append(1))
    converted = fxdbsr.convert(model, block_size=8)
    with warnings.catch_warnings():
        converted(torch.randn(1, 3, 10, 10))
    assert calls == [1]
    assert isinstance(converted.get_submodule("0"), PackedConv)
