"""The two small nets hold the parameters and MACs that the method's arithmetic states."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxdbsr
from fxdbsr.layers import blocked_layers
from fxdbsr.models import resnet20, vgg11_cifar


@pytest.mark.parametrize(
    ("model", "params", "macs"), [(resnet20(100), 278_324, 40.82e6), (vgg11_cifar(100), 9_277_284, 152.8e6)]
)
def test_parameters_and_macs(model: nn.Module, params: int, macs: float) -> None:
    assert sum(p.numel() for p in model.parameters()) == params
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = model.eval()(torch.zeros(1, 3, 32, 32))
    assert y.shape == (1, 100)
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=5e-4)


@pytest.mark.parametrize(("model", "block", "count"), [(resnet20(100), 8, 504), (vgg11_cifar(100), 32, 1000)])
def test_blocks_without_stem_and_classifier(model: nn.Module, block: int, count: int) -> None:
    layers = blocked_layers(fxdbsr.prepare(model, block))
    assert sum(layer.mask.numel() for layer in layers[1:]) == count
