"""Max pools that a conv's step takes itself: the same bits as two steps, and two steps where somebody sees the conv."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("llvmlite")

from fxdbsr.blocks import BlockGrid
from fxdbsr.converted import ConvertedModule
from fxdbsr.kernels import jit
from fxdbsr.kernels.cpu_cuts import code_of, image_tile, register_tile
from fxdbsr.kernels.cpu_layout import Layout
from fxdbsr.kernels.cpu_plan import Geometry, packed_input
from fxdbsr.kernels.cpu_steps import conv_step
from fxdbsr.network import runner
from fxdbsr.network.plan import Run
from tests.test_network import BFLOAT16, assert_same, converted, plan_of, planned_call

pytestmark = pytest.mark.skipif(jit.host() is None, reason="no vector unit that the engine knows")
NEON = jit.target_of("aarch64-unknown-linux-gnu", "neoverse-n1", {})
AVX2 = jit.host() and jit.host(False)


def steps_of(model: nn.Module, x: Tensor) -> int:
    """Steps of the plan for x."""
    planned_call(model, x)
    return sum(len(item.moves) for item in plan_of(model).first.items if isinstance(item, Run))


def two_steps(model: ConvertedModule, patch: pytest.MonkeyPatch) -> ConvertedModule:
    """A copy whose plans leave pools to themselves."""
    other = copy.deepcopy(model)
    patch.setattr(runner, "pools_in_convs", lambda images, operations: (images, operations))
    return other


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("pool", [2, (2, 1), (1, 2)])
@pytest.mark.parametrize(
    ("channels", "kernel", "groups", "block", "size"),
    [
        ((64, 64), 3, 1, (32, 32), (28, 28)),
        ((3, 64), 3, 1, (32, 32), (30, 13)),
        ((40, 72), 3, 1, (32, 32), (7, 9)),
        ((32, 96), 1, 1, (32, 16), (5, 34)),
        ((48, 48), 5, 1, (8, 8), (6, 6)),
        ((32, 32), 3, 32, (32, 1), (9, 8)),
        ((64, 160), 3, 1, (128, 32), (4, 4)),
        ((32, 32), 3, 1, (32, 32), (2, 2)),
    ],
)
def test_a_pool_in_a_conv_gives_the_bits_of_two_steps(
    channels: tuple[int, int],
    kernel: int,
    groups: int,
    block: tuple[int, int],
    size: tuple[int, int],
    pool: int | tuple[int, int],
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(*channels, kernel, padding=kernel // 2, groups=groups)
    net = nn.Sequential(conv, nn.BatchNorm2d(channels[1]), nn.SiLU(), nn.MaxPool2d(pool), nn.Conv2d(channels[1], 32, 1))
    model, x = converted(net.to(dtype), block), torch.randn(3, channels[0], *size).to(dtype)
    assert_same(model, x)
    with pytest.MonkeyPatch.context() as patch:
        other = two_steps(model, patch)
        assert steps_of(other, x) > steps_of(model, x)
        assert torch.equal(planned_call(other, x), planned_call(model, x))


def test_images_of_a_batch_do_not_meet() -> None:
    model = converted(nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)))
    x = torch.randn(9, 32, 15, 15)
    whole = planned_call(model, x)
    assert all(torch.equal(planned_call(model, x[i : i + 1])[0], whole[i]) for i in range(9))


def test_nan_passes_through_a_pool_in_a_conv() -> None:
    model = converted(nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU(), nn.MaxPool2d(2)), sparsity=0.0)
    x = torch.randn(1, 32, 8, 8)
    for row, column in ((0, 0), (3, 2), (5, 5)):
        x[0, 0, row, column] = torch.nan
    found = planned_call(model, x).isnan()
    assert found.sum() == 3 * 32
    assert all(found[0, :, i, i].all() for i in range(3))


class Seen(nn.Module):
    """A conv whose value before the pool has a second reader, or that adds a shortcut, or a pool that overlaps."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.pool = nn.Conv2d(32, 32, 3, padding=1), nn.MaxPool2d(3 if how == "overlap" else 2, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.conv(x)
        if self.how == "shortcut":
            y = y + x
        pooled: Tensor = self.pool(torch.relu(y))
        return (pooled, y) if self.how == "output" else pooled


@pytest.mark.parametrize("how", ["output", "shortcut", "overlap"])
def test_a_conv_whose_whole_value_is_needed_is_a_step_of_its_own(how: str) -> None:
    model, x = converted(Seen(how)), torch.randn(2, 32, 9, 9)
    expected = torch.fx.Interpreter(model).run(x)
    with torch.no_grad():
        found = model(x)
    for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("most", [5, 6, 13, 14, 28])
def test_tiles_fill_windows(most: int) -> None:
    for P in range(2, 20, 2):
        for Q in range(2, 60, 2):
            for pool in ((2, 2), (1, 2), (2, 1)):
                for tile in (
                    image_tile((P, Q), (4, most), 3, (P, 1, 1, 1), pool),
                    register_tile((P, Q), 4, pool),
                ):
                    assert tile[1] % pool[1] == 0
                    assert tile[0] % pool[0] == 0 or pool[0] % tile[0] == 0
                    assert tile[0] <= P
                    assert tile[1] <= Q


def test_code_for_avx2_takes_pools_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "host", lambda *_: AVX2)
    net = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 32, 1))
    model, x = converted(net), torch.randn(2, 32, 14, 13)
    assert_same(model, x)
    assert plan_of(model).first.target == AVX2


def test_neon_code_with_a_pool_compiles_offline() -> None:
    assert NEON is not None
    grid = BlockGrid.of((40, 64, 3, 3), (32, 32))
    conv = Geometry(grid, (1, 1), (1, 1), (1, 1), False, True, "relu", 0.0, (2, 2))
    x, y = packed_input(conv, NEON, (9, 9)), Layout.channels_last(40, (4, 4))
    text = conv_step(code_of(conv, NEON, x, y, None, 1)[0])
    assert "%patch = alloca" in text
    assert jit.object_code(text, NEON).startswith(b"\x7fELF")
