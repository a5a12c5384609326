"""Random small nets in float64: what `prepare` and `convert` make of them computes the same."""

import copy
import pickle
from random import Random

import pytest
import torch
from torch import nn

import fxdbsr
from bench.random_nets import random_masks, random_net
from bench.random_steps import STEPS
from fxdbsr.passes.selection import CONV_TYPES

BLOCKS = (1, 2, 4, (1, None), (None, 1))
SEEDS = range(120)


@torch.no_grad()
@pytest.mark.parametrize("first", SEEDS[::10])
def test_random_nets_stay_equal(first: int) -> None:
    for seed in range(first, first + 10):
        net, x = random_net(seed)
        prepared = fxdbsr.prepare(net, Random(seed).choice(BLOCKS), types=(*CONV_TYPES, nn.Linear))
        with torch.enable_grad():  # without gradients torch.matmul goes another way for weights that need none
            assert torch.equal(prepared(x), net(x)), seed
        random_masks(prepared, seed)
        expected, found = prepared(x), fxdbsr.convert(prepared, backend="reference")(x)
        assert (found - expected).abs().max() <= 1e-9 * expected.abs().max(), seed


def test_random_nets_are_the_same_for_a_seed_and_can_be_copied_and_pickled() -> None:
    net, x = random_net(3)
    again, y = random_net(3)
    assert torch.equal(x, y)
    for other in (again, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(net(x), other(x))


def test_random_nets_take_every_kind_of_step() -> None:
    taken = {kind for seed in SEEDS for kind, _, _ in random_net(seed)[0].steps}
    assert taken == set(STEPS)
