"""The kernels beside the block-sparse ones, compiled for GPUs that are not there, with what they are launched with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from fxdbsr.kernels import triton_grouped, triton_pad, triton_pool, triton_stem  # noqa: E402
from fxdbsr.kernels.triton_device import H200  # noqa: E402
from fxdbsr.kernels.triton_machine_code import MATRIX, Facts  # noqa: E402
from fxdbsr.kernels.triton_offline import compile_kernel  # noqa: E402

GPUS = ("cuda:80", "cuda:90")
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@pytest.fixture(scope="module", autouse=True)
def compiled_anew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Triton's cache on disk would hide a compiler that changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.mktemp("triton")))
        yield


class Compiles:
    """Stands for a kernel and is compiled for `target` where that would be launched."""

    def __init__(self, kernel: Any, target: str, dtype: torch.dtype) -> None:
        self.kernel, self.target, self.dtype = kernel, target, NAMES[dtype]
        self.facts: list[Facts] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*_: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
            names = [name for name in self.kernel.arg_names if name not in constants]
            pointers = {name: f"*{self.dtype}" for name in names if name.endswith("_ptr")}
            scalars = {name: "fp32" if name == "slope" else "i32" for name in names if name not in pointers}
            how = (num_warps, num_stages, self.target)
            self.facts.append(compile_kernel(self.kernel, pointers, scalars, constants, *how))

        return launch


STEMS = {
    "ResNet": ((3, 224), (64, 7, 2, 3)),
    "VGG": ((3, 224), (64, 3, 1, 1)),
    "VGG, half of its channels dead": ((3, 224), (32, 3, 1, 1)),
    "EfficientNet": ((3, 224), (32, 3, 2, 1)),
    "ConvNeXt": ((3, 224), (96, 4, 4, 0)),
    "four channels": ((4, 64), (64, 7, 4, 3)),
}


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize(("images", "conv"), STEMS.values(), ids=STEMS)
def test_first_convs_multiply_on_the_matrix_unit_without_spills(
    monkeypatch: pytest.MonkeyPatch, images: tuple[int, int], conv: tuple[int, int, int, int], target: str
) -> None:
    (channels, size), (outputs, taps, stride, padding) = images, conv
    x = torch.zeros(1, channels, size, size, dtype=torch.float16)
    weight, bias = torch.zeros(outputs, channels, taps, taps, dtype=torch.float16), torch.zeros(outputs).half()
    compiled = Compiles(triton_stem.stem_kernel, target, torch.float16)
    monkeypatch.setattr(triton_stem, "stem_kernel", compiled)
    copies = Compiles(triton_pad.pad_kernel, target, torch.float16)
    monkeypatch.setattr(triton_pad, "pad_kernel", copies)
    monkeypatch.setattr(triton_stem, "device_of", lambda _: replace(H200, target=target))
    triton_stem.conv(x, weight, bias, (stride,) * 2, (padding,) * 2, (1, 1), "relu", 0.0)
    (facts,) = compiled.facts
    assert [found.spills for found in (facts, *copies.facts)] == [0, 0]
    assert facts.unsettled == ()
    assert facts.matrix == MATRIX[target][0 if outputs >= 64 or target == "cuda:90" else -1]


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_max_pools_do_not_spill(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, target: str) -> None:
    compiled = Compiles(triton_pool.pool_kernel, target, dtype)
    monkeypatch.setattr(triton_pool, "pool_kernel", compiled)
    triton_pool.max_pool(torch.zeros(1, 64, 112, 112, dtype=dtype), (3, 3), (2, 2), (1, 1), (1, 1))
    (facts,) = compiled.facts
    assert (facts.spills, facts.matrix) == (0, "")
    assert facts.registers <= 64  # so that many programs hide what memory takes


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize(("channels", "groups"), [(128, 32), (256, 32), (512, 32), (96, 6)])
def test_convs_of_few_channels_a_group_multiply_on_the_matrix_unit_without_spills(
    monkeypatch: pytest.MonkeyPatch, channels: int, groups: int, target: str
) -> None:
    x = torch.zeros(1, channels, 14, 14, dtype=torch.float16)
    weight, bias = torch.zeros(channels, channels // groups, 3, 3).half(), torch.zeros(channels).half()
    compiled = Compiles(triton_grouped.grouped_kernel, target, torch.float16)
    monkeypatch.setattr(triton_grouped, "grouped_kernel", compiled)
    triton_grouped.conv(x, triton_grouped.spread(weight, groups), bias, (1, 1), (1, 1), (1, 1), groups, "relu", 0.0)
    (facts,) = compiled.facts
    assert facts.spills == 0
    assert facts.unsettled == ()
    assert facts.matrix == "HMMA"
