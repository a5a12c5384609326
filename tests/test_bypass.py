"""Which sets of convs may lose all their blocks."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxdbsr
from fxdbsr.bypass import Bypass
from fxdbsr.layers import blocked_layers


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.shortcut = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.branch(x)
        y += self.shortcut(x)
        out: Tensor = y.mean((2, 3))
        return out


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(4, 4, 1)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.sigmoid(self.gate(x))
        y = torch.cat([self.left(x), self.right(x)], 1)
        return y.view(x.size(0), -1)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z: Tensor = self.a(x) + self.b(y)
        return z


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": self.a(x), "b": self.b(x)}


def surviving(model: nn.Module) -> set[frozenset[str]]:
    """All sets of layers that may die, by name."""
    prepared = fxdbsr.prepare(model, 4)
    layers = blocked_layers(prepared)
    bypass = Bypass(prepared, layers)
    return {
        frozenset(layers[i].name for i in dead)
        for n in range(len(layers) + 1)
        for dead in itertools.combinations(range(len(layers)), n)
        if bypass.survives(frozenset(dead))
    }


def sets(*names: str) -> set[frozenset[str]]:
    return {frozenset(n.split()) for n in names}


def test_a_branch_or_its_shortcut_may_die_but_never_both() -> None:
    branch = sets("branch.0", "branch.2", "branch.0 branch.2")
    assert surviving(Residual()) == sets("", "shortcut") | branch


def test_a_gate_never_dies_and_one_of_the_concatenated_may() -> None:
    assert surviving(Gated()) == sets("", "left", "right")


def test_every_output_keeps_every_input() -> None:
    assert surviving(TwoInputs()) == sets("")
    assert surviving(TwoOutputs()) == sets("")


def test_an_auxiliary_head_of_training_may_die() -> None:
    prepared = fxdbsr.prepare(torchvision.models.googlenet(weights=None, init_weights=False), 64)
    layers = blocked_layers(prepared)
    bypass = Bypass(prepared, layers)
    aux = {i for i, layer in enumerate(layers) if layer.name.startswith("aux")}
    assert len(aux) == 2
    assert bypass.survives(aux)
    assert not bypass.survives({0})


def test_a_model_around_the_graph_is_judged_by_its_graphs() -> None:
    prepared = fxdbsr.prepare(Residual(), 4)
    wrapped = nn.Sequential(prepared, nn.Linear(8, 2))
    bypass = Bypass(wrapped, blocked_layers(wrapped))
    assert bypass.survives({3})
    assert not bypass.survives({0})


def test_a_layer_that_no_graph_shows_never_dies() -> None:
    prepared = fxdbsr.prepare(Residual(), 4)
    bare = nn.ModuleDict({"conv": prepared.get_submodule("stem")})
    bypass = Bypass(bare, blocked_layers(bare))
    assert bypass.survives(frozenset())
    assert not bypass.survives({0})


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_what_survives_still_depends_on_the_input(name: str) -> None:
    """With whole layers as blocks, greedily killing all that may die leaves outputs that differ by input."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    prepared = fxdbsr.prepare(model, (None, None)).eval()
    fxdbsr.block_prune_(prepared, 1.0, score="random", generator=torch.Generator().manual_seed(1))
    layers = blocked_layers(prepared)
    assert 0 < sum(not bool(layer.mask.any()) for layer in layers) < len(layers)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        y = prepared(x).double()
    assert (y[0] - y[1]).abs().max() > 1e-12 * y.abs().max()


@pytest.mark.parametrize("name", ["resnet152", "densenet201"])
def test_a_check_of_a_deep_net_takes_milliseconds(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    prepared = fxdbsr.prepare(model, 32)
    layers = blocked_layers(prepared)
    bypass = Bypass(prepared, layers)
    start = time.perf_counter()
    for i in range(len(layers)):
        bypass.survives({i})
    assert (time.perf_counter() - start) / len(layers) < 0.02
