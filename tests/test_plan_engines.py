"""On a GPU the rule behind "auto" weighs blocks, epilogue and input size; what it needs to know is noted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxdbsr
from fxdbsr.blocks import BlockGrid
from fxdbsr.kernels.choice import Case, Choice, choose
from fxdbsr.nn.fastest import tolerance
from fxdbsr.nn.packed import PackedConv
from tests.triton_cases import float32_precision

pytest.importorskip("triton")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def tf32() -> Iterator[None]:
    with float32_precision("tf32"):
        yield


def choice_for(channels: int, outputs: int, kernel: int, block: tuple[int, int], **seen: Any) -> Choice:
    """What is chosen for a conv on a GPU, every fifth block kept."""
    grid = BlockGrid.of((outputs, channels, kernel, kernel), block)
    keep = torch.arange(grid.shape[0] * grid.shape[1]).view(grid.shape) % 5 == 0
    _, crow, col = grid.pack(torch.ones(grid.weight_shape), keep)
    half = (kernel // 2, kernel // 2)
    case = Case(grid, crow, col, (1, 1), half, (1, 1), torch.float16, CUDA, **({"activation": "relu"} | seen))
    return choose("auto", case)


def chosen(channels: int, outputs: int, kernel: int, **seen: Any) -> tuple[str, str]:
    """Engine and reason for a conv with blocks of 128x32 on a GPU, every fifth block kept."""
    choice = choice_for(channels, outputs, kernel, (128, 32), **seen)
    return choice.engine, choice.reason


def test_wide_3x3_convs_go_sparse() -> None:
    engine, reason = chosen(512, 512, 3, size=(32, 28, 28))
    assert engine == "triton"
    found = re.match(r"16-bit dense is estimated at ([\d.]+) us \(cudnn_convolution_relu", reason)
    assert found
    assert float(found[1]) == pytest.approx(156, abs=1)  # 118.4 GFLOP at 81.5 % of 990 TFLOP/s, 8.4 us and 1.1 us


@pytest.mark.parametrize(("channels", "block"), [(256, (32, 32)), (512, (64, 16)), (512, (128, 32))], ids=str)
def test_the_form_that_the_planner_weighed_is_the_one_that_is_packed(channels: int, block: tuple[int, int]) -> None:
    choice = choice_for(channels, channels, 3, block, size=(32, 28, 28))
    rows = choice.form["rows_per_union"]
    assert (choice.engine, choice.form) == ("triton", {"kernel": "gather", "rows_per_union": rows})
    assert choice.reason.endswith("(gather)" if rows == 1 else f"(gather, {rows} rows)")


def test_a_conv_that_stays_dense_has_no_form() -> None:
    assert choice_for(64, 256, 1, (128, 32), size=(32, 56, 56)).form == {}


def test_memory_bound_convs_stay_dense() -> None:
    engine, reason = chosen(64, 256, 1, size=(32, 56, 56))
    assert engine == "dense"
    assert reason.startswith("16-bit dense is estimated at 22")  # 64 MB at 60 % of 4.8 TB/s


def test_an_epilogue_that_cudnn_cannot_fuse_tips_the_scales() -> None:
    assert chosen(64, 256, 1, size=(32, 56, 56), activation="silu")[0] == "triton"


def test_an_unknown_size_is_taken_to_be_large() -> None:
    assert chosen(512, 512, 3)[0] == "triton"


def test_a_known_plane_counts_where_the_batch_is_unknown() -> None:
    assert chosen(512, 512, 3, size=(0, 7, 7)) == chosen(512, 512, 3, size=(32, 7, 7))
    assert chosen(512, 512, 3, size=(0, 7, 7)) != chosen(512, 512, 3)


def test_what_the_engine_cannot_run_stays_dense() -> None:
    engine, reason = chosen(16, 64, 3)
    assert (engine, "32 input channels" in reason) == ("dense", True)


def test_the_cost_of_a_cpu_says_nothing_on_a_gpu() -> None:
    grid = BlockGrid.of((64, 16, 3, 3), (32, 8))
    _, crow, col = grid.pack(torch.ones(grid.weight_shape), torch.tensor([[True, False], [False, False]]))
    case = Case(grid, crow, col, (1, 1), (1, 1), (1, 1), torch.float16, CUDA)
    assert choose("auto", case).engine == "dense"


def test_tuning_allows_for_tf32_on_a_gpu_alone() -> None:
    found = [tolerance(torch.float32, torch.device(name)) for name in ("cuda", "cpu")]
    with float32_precision("ieee"):
        found.append(tolerance(torch.float32, CUDA))
    assert found == [2e-3, 1e-4, 1e-4]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + x)


def packed(**arguments: Any) -> list[PackedConv]:
    fast = fxdbsr.convert(fxdbsr.prepare(Residual()), backend="reference", **arguments)
    return [module for module in fast.modules() if isinstance(module, PackedConv)]


def test_residuals_are_noted() -> None:
    assert [layer.adds_residual for layer in packed()] == [False, True]


def test_sizes_of_the_example_inputs_are_noted() -> None:
    assert [layer.input_size for layer in packed(example_inputs=torch.zeros(2, 32, 5, 7))] == [(2, 5, 7)] * 2
    assert [layer.input_size for layer in packed()] == [None, None]


def test_example_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="example_inputs: the model's forward fails on them"):
        packed(example_inputs=torch.zeros(2, 31, 5, 7))


def test_3xtf32_is_noted_for_every_layer() -> None:
    fast = fxdbsr.convert(fxdbsr.prepare(Residual()), backend="reference")
    assert fxdbsr.set_float32_precision(fast, "3xtf32") is fast
    assert {m.precision for m in fast.modules() if isinstance(m, PackedConv)} == {"3xtf32"}


@pytest.mark.parametrize(
    ("model", "precision", "reason"),
    [(nn.ReLU(), "3xtf32", "model: expected a converted model, got ReLU"), (nn.ReLU(), "tf32", "precision: expected")],
    ids=["not converted", "unknown"],
)
def test_other_models_and_precisions_are_refused(model: nn.Module, precision: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        fxdbsr.set_float32_precision(model, precision)
