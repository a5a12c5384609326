"""The benches of the CPU engine on small things: what they say they measure."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("llvmlite")

from bench import cpu_layers
from fxdbsr.kernels import jit

pytestmark = pytest.mark.skipif(jit.host() is None, reason="no vector unit that the engine knows")


def test_pools_belong_to_the_conv_before_them() -> None:
    first, second, third = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
    norm, pool = nn.BatchNorm2d(8), nn.MaxPool2d(2)
    net = nn.Sequential(first, second, norm, nn.ReLU(), pool, third, nn.MaxPool2d(3, 2, 1)).eval()
    assert cpu_layers.pools_of(net) == {second: 2}
    found = cpu_layers.convs_of(net, torch.randn(1, 8, 12, 12))
    assert {key[-2:]: calls for key, calls in found.items()} == {
        ((12, 12), None): 1,
        ((12, 12), 2): 1,
        ((6, 6), None): 1,
    }


@pytest.mark.parametrize("pool", [None, 2])
def test_a_conv_is_measured_as_a_step_and_as_a_call(pool: int | None) -> None:
    conv = nn.Conv2d(32, 32, 3, padding=1).eval().requires_grad_(False)
    x = torch.randn(1, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    rows = list(cpu_layers.measured(conv, pool, x, "16x16", 0.5, 2))
    assert [row["arm"] for row in rows] == ["step", "call"]
    assert all(row["error"] < 1e-5 and row["error_dense"] < 1e-5 and row["median"] > 0 for row in rows)
