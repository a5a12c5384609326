"""Each pass by itself, after those alone that it needs: the model computes the same, whatever the zeros look like."""

import copy
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxdbsr
from bench.coverage import enliven
from bench.random_nets import random_masks, random_net
from fxdbsr.layers import blocked_layers
from fxdbsr.models import resnet20
from fxdbsr.passes import CONVERT, run
from fxdbsr.passes.fold_scales import fold_scales
from fxdbsr.passes.lowering import Lowering
from fxdbsr.passes.pack_convs import pack_convs
from fxdbsr.passes.selection import CONV_TYPES
from fxdbsr.traced import TwoGraphModule

AFTER_PACKING = ("fuse_epilogues", "plan_engines", "tune_engines")
ALONE: dict[str, tuple[Callable[[Any, Any], None], ...]] = {
    one.__name__: tuple(
        p for p in CONVERT if p in (fold_scales, one) or (p is pack_convs and one.__name__ in AFTER_PACKING)
    )
    for one in CONVERT
}


def after(prepared: nn.Module, passes: tuple[Callable[[Any, Any], None], ...], x: Tensor) -> fx.GraphModule:
    """`prepared` after `passes`, on the reference."""
    graph = prepared.graph_module(False) if isinstance(prepared, TwoGraphModule) else prepared
    model = copy.deepcopy(graph)
    assert isinstance(model, fx.GraphModule)
    run(passes, model, Lowering("reference", example_inputs=(x,)))
    return model


@torch.no_grad()
@pytest.mark.parametrize("structure", ["random", "rows", "columns", "zero"])
def test_resnet20_stays_equal(structure: str) -> None:
    torch.manual_seed(0)
    generator, x = torch.Generator().manual_seed(0), torch.randn(2, 3, 16, 16)
    prepared = fxdbsr.prepare(resnet20(), 8)
    for layer in blocked_layers(prepared):
        mask = torch.rand(layer.mask.shape, generator=generator) > 0.4
        masks = {"random": mask, "rows": mask[:, :1], "columns": mask[:1], "zero": torch.zeros_like(mask)}
        layer.set_mask(masks[structure].expand_as(mask).clone())
        layer.scale.uniform_(0.8, 1.6, generator=generator)
    enliven(prepared, x, generator)
    prepared.eval().double()
    expected = prepared(x.double())
    for name, passes in (ALONE | {"all": CONVERT}).items():
        torch.testing.assert_close(
            after(prepared, passes, x.double())(x.double()), expected, rtol=1e-9, atol=1e-9, msg=name
        )


@torch.no_grad()
@pytest.mark.parametrize("name", ALONE)
def test_random_nets_stay_equal(name: str) -> None:
    for seed in range(25):
        net, x = random_net(seed)
        prepared = fxdbsr.prepare(net, Random(seed).choice((1, 2, 4)), types=(*CONV_TYPES, nn.Linear))
        random_masks(prepared, seed)
        expected = prepared(x)
        assert (after(prepared, ALONE[name], x)(x) - expected).abs().max() <= 1e-9 * expected.abs().max(), seed
