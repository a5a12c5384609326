"""Kernels beside the block-sparse ones: a network's first conv, max pools, and an epilogue written in place."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxdbsr.kernels import dense, reference
from fxdbsr.kernels import pool as pooling
from fxdbsr.kernels.geometry import ACTIVATIONS
from tests.gpu_stand_in import on_a_gpu
from tests.triton_cases import DEVICE, GPU, imported, needs_interpreter

pytestmark = needs_interpreter
ONE = (1, 1)
LAST = torch.channels_last


@pytest.fixture(scope="module", autouse=True)
def engine() -> Iterator[ModuleType]:
    with imported() as module:
        yield module


def kernels(name: str) -> Any:
    """The module of that name, interpreted where there is no GPU."""
    return importlib.import_module(f"fxdbsr.kernels.{name}")


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers that `dtype` holds exactly."""
    return torch.randn(shape, dtype=torch.float64).to(dtype).double()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@dataclass(frozen=True)
class Stem:
    """A first conv; every default is the plainest choice."""

    channels: int = 3
    outputs: int = 16
    kernel: tuple[int, int] = (3, 3)
    size: tuple[int, int] = (9, 11)
    stride: tuple[int, int] = ONE
    padding: tuple[int, int] = ONE
    dilation: tuple[int, int] = ONE
    bias: bool = True
    activation: str = "relu"
    batch: int = 2


STEMS = {
    "ResNet's": Stem(outputs=64, kernel=(7, 7), size=(22, 18), stride=(2, 2), padding=(3, 3)),
    "VGG's": Stem(outputs=64),
    "EfficientNet's, SiLU": Stem(outputs=32, size=(13, 14), stride=(2, 2), activation="silu"),
    "one channel, odd sizes": Stem(channels=1, size=(7, 5), kernel=(5, 3), padding=(0, 2)),
    "two channels, stride along one axis": Stem(channels=2, size=(8, 8), stride=(1, 2)),
    "four channels": Stem(channels=4, size=(10, 12), kernel=(5, 5), padding=(2, 2), stride=(2, 2)),
    "four channels, patches": Stem(channels=4, size=(16, 16), kernel=(4, 4), padding=(0, 0), stride=(4, 4)),
    "1x1 without padding": Stem(kernel=ONE, padding=(0, 0), bias=False, activation="none"),
    "more outputs than a program": Stem(outputs=72, size=(5, 6)),
    "outputs that fill no tile": Stem(outputs=5, size=(5, 6), bias=False),
    "more padding than the kernel needs": Stem(size=(4, 5), padding=(3, 4)),
    "dilation along columns": Stem(size=(9, 8), dilation=(2, 1), padding=(2, 1)),
    "more pixels than a program": Stem(size=(23, 7), batch=3),
    "one pixel": Stem(size=ONE),
    "one pixel, nothing around it": Stem(size=ONE, kernel=ONE, padding=(0, 0), batch=3),
}


def stem(case: Stem, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, pool: int = 1) -> Tensor:
    """The conv by the kernel, in `dtype`, and a max pool of `pool` by `pool` where that is not 1."""
    x, weight = x.to(DEVICE, dtype), weight.to(DEVICE, dtype)
    module = kernels("triton_stem")
    assert module.why_not(x, weight, None, case.stride, case.padding, case.dilation, 1) is None
    b = None if bias is None else bias.to(DEVICE, dtype)
    y: Tensor = module.conv(x, weight, b, case.stride, case.padding, case.dilation, case.activation, 0.01, pool)
    return y


def stem_data(case: Stem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    x = random(case.batch, case.channels, *case.size, dtype=dtype)
    weight = random(case.outputs, case.channels, *case.kernel, dtype=dtype)
    return x, weight, random(case.outputs, dtype=dtype) if case.bias else None


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=["channels last", "contiguous"])
@pytest.mark.parametrize("case", STEMS.values(), ids=STEMS)
def test_a_first_conv_is_as_right_as_float16_can_be(case: Stem, layout: torch.memory_format) -> None:
    x, weight, bias = stem_data(case, torch.float16)
    exact = reference.activate(F.conv2d(x, weight, bias, case.stride, case.padding, case.dilation), case.activation)
    y = stem(case, x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout), bias, torch.float16)
    assert y.shape == exact.shape
    assert y.is_contiguous(memory_format=LAST)
    # summed in float32, rounded once
    assert (y.cpu() - exact).abs().max() <= torch.finfo(torch.float16).eps * exact.abs().max()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_first_conv_ends_with_every_activation(activation: str) -> None:
    case = Stem(size=(4, 5), outputs=8, activation=activation)
    x, weight, bias = stem_data(case, torch.float16)
    exact = reference.activate(F.conv2d(x, weight, bias, padding=1), activation)
    y = stem(case, x, weight, bias, torch.float16)
    assert (y.cpu() - exact).abs().max() <= torch.finfo(torch.float16).eps * exact.abs().max()


@pytest.mark.skipif(not GPU, reason="Triton's interpreter multiplies the bit patterns of bfloat16")
def test_a_first_conv_runs_bfloat16() -> None:
    case = STEMS["ResNet's"]
    x, weight, bias = stem_data(case, torch.bfloat16)
    exact = F.relu(F.conv2d(x, weight, bias, case.stride, case.padding))
    y = stem(case, x, weight, bias, torch.bfloat16)
    assert (y.cpu() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()


CORNERS = {"first": (0, 0, 0, 0), "end of a row": (0, -1, 3, -1), "last": (-1, -1, -1, -1), "middle": (1, 0, 4, 2)}


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # in lanes without outputs
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("where", CORNERS.values(), ids=CORNERS)
@pytest.mark.parametrize("name", ["ResNet's", "two channels, stride along one axis", "one channel, odd sizes"])
def test_a_pixel_that_is_not_finite_reaches_those_that_read_it_alone(
    name: str, where: tuple[int, ...], value: float
) -> None:
    case = replace(STEMS[name], activation="none")
    x, weight, bias = stem_data(case, torch.float16)
    weight = weight.where(weight != 0, torch.ones_like(weight))
    x[where] = value
    exact = F.conv2d(x, weight, bias, case.stride, case.padding)
    y = stem(case, x, weight, bias, torch.float16).cpu().double()
    assert not exact.isfinite().all()
    torch.testing.assert_close(y, exact, rtol=1e-3, atol=1e-2, equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, infinity by zero
def test_a_weight_that_is_not_finite_makes_its_own_outputs_so() -> None:
    case = Stem(size=(5, 6), activation="none")
    x, weight, bias = stem_data(case, torch.float16)
    weight[3, 1, 2, 2] = torch.inf
    y = stem(case, x, weight, bias, torch.float16).cpu().double()
    others = [o for o in range(case.outputs) if o != 3]
    exact = F.conv2d(x, weight, bias, padding=1)
    assert not exact[:, 3].isfinite().all()
    torch.testing.assert_close(y[:, others], exact[:, others], rtol=1e-3, atol=1e-2)


HALF = {"x": (2, 3, 8, 8), "weight": (16, 3, 3, 3)}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no batch": ({"x": (3, 8, 8)}, "it runs 2-d convs of batches"),
    "3-d": ({"weight": (16, 3, 3, 3, 3)}, "it runs 2-d convs of batches"),
    "float32": ({"dtype": torch.float32}, "it runs float16 and bfloat16, not float32"),
    "float64": ({"dtype": torch.float64}, "it runs float16 and bfloat16, not float64"),
    "two dtypes": ({"weight_dtype": torch.bfloat16}, "it runs float16 and bfloat16"),
    "many channels": ({"x": (2, 5, 8, 8), "weight": (16, 5, 3, 3)}, "it runs up to 4 channels"),
    "groups": ({"weight": (15, 1, 3, 3), "groups": 3}, "it runs up to 4 channels, one group"),
    "tall kernel": ({"weight": (16, 3, 8, 1)}, "up to 7 taps an axis"),
    "wide kernel": ({"weight": (16, 3, 1, 8)}, "up to 7 taps an axis"),
    "dilation": ({"dilation": (1, 2)}, "no dilation along rows"),
    "residual": ({"residual": True}, "it adds no residual"),
    "other channels": ({"x": (2, 4, 8, 8)}, "torch says what is wrong with it"),
    "small image": ({"x": (2, 3, 8, 2), "padding": (0, 0)}, "torch says what is wrong with it"),
    "large input": ({"x": (2**15, 4, 2**7, 2**7), "weight": (1, 4, 1, 1), "device": "meta"}, "fewer than 2**31"),
    "large output": ({"x": (2**12, 3, 2**7, 2**7), "weight": (64, 3, 3, 3), "device": "meta"}, "fewer than 2**31"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_the_first_conv_is_not_made_for_is_a_sentence(change: dict[str, Any], reason: str) -> None:
    dtype = change.get("dtype", torch.float16)
    x = torch.zeros(change.get("x", HALF["x"]), dtype=dtype, device=change.get("device"))
    weight = torch.zeros(change.get("weight", HALF["weight"]), dtype=change.get("weight_dtype", dtype))
    residual = torch.zeros(2, 16, 8, 8, dtype=dtype) if change.get("residual") else None
    geometry = (ONE, change.get("padding", ONE), change.get("dilation", ONE), change.get("groups", 1))
    found = kernels("triton_stem").why_not(x, weight, residual, *geometry)
    assert reason in str(found)


def test_images_that_grow_too_large_with_their_padding_are_refused() -> None:
    weight = torch.zeros(1, 1, 3, 3, dtype=torch.half)
    found = []
    for padding in (1, 3):
        x = torch.empty(1, 1, 2**14, 2**15 - 8, dtype=torch.half, device="meta")
        found.append(kernels("triton_stem").why_not(x, weight, None, (2, 2), (0, padding), ONE, 1))
    assert found[0] is None
    assert "fewer than 2**31" in found[1]


class Launches:
    """Stands for a kernel and notes what it is launched with."""

    def __init__(self) -> None:
        self.found: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self.found.append((grid, arguments, constants))


@pytest.mark.parametrize("case", STEMS.values(), ids=STEMS)
def test_no_tile_reads_past_the_copied_images(monkeypatch: pytest.MonkeyPatch, case: Stem) -> None:
    module, launches = kernels("triton_stem"), Launches()
    monkeypatch.setattr(module, "stem_kernel", launches)
    x, weight, bias = stem_data(case, torch.float16)
    for pool in (1, 2):
        stem(case, x, weight, bias, torch.float16, pool)
    for _, (images, *_), found in launches.found:
        down, across = -(-found["P"] // found["TH"]), -(-found["Q"] // found["TW"])
        rows, columns = found["H"] + 2 * found["PH"], found["W"] + 2 * found["PW"]
        row = (case.batch - 1) * rows + (down * found["TH"] - 1) * found["SH"] + (found["R"] - 1) * found["DH"]
        column = (across * found["TW"] - 1) * found["SW"] + found["S"] - 1
        assert (row * columns + column + 1) * 4 <= images.numel()


@pytest.mark.parametrize("name", ["ResNet's", "VGG's", "more outputs than a program", "outputs that fill no tile"])
def test_programs_that_take_several_tiles_compute_them_all(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module = kernels("triton_stem")
    device = replace(module.device_of(DEVICE), processors=1)
    monkeypatch.setattr(module, "device_of", lambda _: device)
    case = replace(STEMS[name], size=(21, 23), batch=5)
    x, weight, bias = stem_data(case, torch.float16)
    exact = F.relu(F.conv2d(x, weight, bias, case.stride, case.padding))
    y = stem(case, x, weight, bias, torch.float16)
    assert (y.cpu() - exact).abs().max() <= torch.finfo(torch.float16).eps * exact.abs().max()


@pytest.mark.parametrize("view", ["every second pixel", "channels apart", "one image for all", "columns first"])
def test_a_first_conv_reads_images_of_any_strides(view: str) -> None:
    case = Stem(size=(8, 7))
    x, weight, bias = stem_data(case, torch.float16)
    x = {
        "every second pixel": x.repeat_interleave(2, 3)[..., ::2],
        "channels apart": x.repeat_interleave(3, 1)[:, ::3],
        "one image for all": x[:1].expand_as(x),
        "columns first": x.transpose(2, 3).contiguous().transpose(2, 3),
    }[view]
    exact = F.relu(F.conv2d(x, weight, bias, padding=1))
    y = stem(case, x, weight.transpose(2, 3).contiguous().transpose(2, 3), bias, torch.float16)
    assert (y.cpu() - exact).abs().max() <= torch.finfo(torch.float16).eps * exact.abs().max()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, infinity less infinity
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("name", ["ResNet's", "VGG's", "four channels", "four channels, patches"])
def test_what_stands_beside_the_taps_of_a_pixel_does_not_reach_it(name: str, value: float) -> None:
    case = replace(STEMS[name], activation="none")
    x, weight, bias = stem_data(case, torch.float16)
    weight = weight.where(weight != 0, torch.ones_like(weight))
    (height, width), (down, across) = case.kernel, case.stride
    top, left = 2 * down - case.padding[0], 2 * across - case.padding[1]  # of the taps of pixel (2, 2)
    x[..., top : top + height, left + width] = value
    x[..., top + height, left : left + width] = value
    exact = F.conv2d(x, weight, bias, case.stride, case.padding)
    assert exact[..., 2, 2].isfinite().all()
    assert not exact.isfinite().all()
    y = stem(case, x, weight, bias, torch.float16).cpu().double()
    torch.testing.assert_close(y, exact, rtol=1e-3, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pool", [2, 3, 4])
def test_a_first_conv_pools_after_every_activation(pool: int, activation: str) -> None:
    case = Stem(size=(9, 8), outputs=8, activation=activation)
    x, weight, bias = stem_data(case, torch.float16)
    exact = F.max_pool2d(reference.activate(F.conv2d(x, weight, bias, padding=1), activation), pool)
    y = stem(case, x, weight, bias, torch.float16, pool)
    assert y.is_contiguous(memory_format=LAST)
    assert (y.cpu() - exact).abs().max() <= torch.finfo(torch.float16).eps * exact.abs().max()


@pytest.mark.parametrize("size", [(8, 8), (9, 11), (11, 38)], ids=str)
@pytest.mark.parametrize("pool", [2, 4])
@pytest.mark.parametrize("name", ["ResNet's", "VGG's", "outputs that fill no tile"])
def test_a_pool_in_the_first_conv_is_the_pool_of_its_output(name: str, pool: int, size: tuple[int, int]) -> None:
    case = replace(STEMS[name], size=size)
    x, weight, bias = stem_data(case, torch.float16)
    x[0, 0, 1, 1] = torch.nan
    whole, pooled = (stem(case, x, weight, bias, torch.float16, side) for side in (1, pool))
    torch.testing.assert_close(pooled, F.max_pool2d(whole.float(), pool).half(), rtol=0, atol=0, equal_nan=True)


def test_a_bias_that_is_a_view_is_read_as_it_is() -> None:
    case = Stem(size=(4, 5), activation="none")
    x, weight, _ = stem_data(case, torch.float16)
    bias = random(16, 2, dtype=torch.float16).to(DEVICE, torch.float16)[:, 1]
    y = stem(case, x, weight, bias, torch.float16).cpu().double()
    torch.testing.assert_close(y, F.conv2d(x, weight, bias.cpu().double(), padding=1), rtol=1e-3, atol=1e-2)


def test_a_dilation_that_a_kernel_without_rows_cannot_use_is_allowed() -> None:
    x, weight = torch.zeros(HALF["x"], dtype=torch.half), torch.zeros(HALF["weight"], dtype=torch.half)
    assert kernels("triton_stem").why_not(x, weight, None, ONE, ONE, (2, 1), 1) is None


POOLS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "ResNet's": ((2, 64, 13, 12), {"kernel_size": (3, 3), "stride": (2, 2), "padding": ONE}),
    "VGG's": ((2, 16, 8, 10), {"kernel_size": (2, 2), "stride": (2, 2)}),
    "odd sizes": ((3, 8, 7, 9), {"kernel_size": (2, 3), "stride": (3, 1), "padding": (1, 0)}),
    "dilation": ((1, 24, 9, 8), {"kernel_size": (3, 2), "stride": ONE, "padding": (1, 1), "dilation": (2, 3)}),
    "channels of two programs": ((1, 136, 5, 4), {"kernel_size": (3, 3), "stride": ONE, "padding": ONE}),
    "one channel block, many pixels": ((2, 8, 15, 17), {"kernel_size": (3, 3), "stride": (2, 2), "padding": ONE}),
    "one pixel out": ((2, 8, 7, 7), {"kernel_size": (7, 7), "stride": ONE}),
}


def pool(x: Tensor, kernel_size: Any, stride: Any, padding: Any = (0, 0), dilation: Any = ONE) -> Tensor:
    module = kernels("triton_pool")
    x = x.to(DEVICE).contiguous(memory_format=LAST)
    assert module.why_not(x, kernel_size, stride, padding, dilation) is None
    y: Tensor = module.max_pool(x, kernel_size, stride, padding, dilation)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", POOLS)
def test_a_max_pool_is_torchs(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not GPU:
        pytest.skip("Triton's interpreter fills no tensor of bfloat16")
    shape, options = POOLS[name]
    x = torch.randn(shape, dtype=dtype)
    y = pool(x, **options)
    assert y.is_contiguous(memory_format=LAST)
    assert torch.equal(y.cpu(), F.max_pool2d(x, **options))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("name", ["ResNet's", "odd sizes", "dilation"])
def test_a_max_pool_of_what_is_not_finite_is_torchs(name: str, value: float) -> None:
    shape, options = POOLS[name]
    x = torch.randn(shape)
    for n, c, h, w in ((0, 0, 0, 0), (0, 5, -1, -1), (-1, 7, 3, 0), (-1, 2, 4, -1)):
        x[n, c, h, w] = value
    torch.testing.assert_close(pool(x, **options).cpu(), F.max_pool2d(x, **options), rtol=0, atol=0, equal_nan=True)


def test_a_max_pool_of_nothing_but_minus_infinity_is_minus_infinity() -> None:
    y = pool(torch.full((1, 8, 4, 4), -torch.inf), (3, 3), (2, 2), ONE)
    assert (y == -torch.inf).all()


IMAGES = torch.zeros(1, 8, 9, 9).to(memory_format=LAST)
UNPOOLED: dict[str, tuple[Tensor, tuple[int, int], tuple[int, int], str]] = {
    "no batch": (torch.zeros(8, 4, 4), (2, 2), (0, 0), "it pools batches of images"),
    "empty": (torch.zeros(0, 8, 4, 4), (2, 2), (0, 0), "it pools batches of images"),
    "float64": (IMAGES.double(), (2, 2), (0, 0), "float16, bfloat16 and float32, not float64"),
    "int8": (IMAGES.to(torch.int8), (2, 2), (0, 0), "float16, bfloat16 and float32, not int8"),
    "contiguous": (torch.zeros(1, 8, 9, 9), (2, 2), (0, 0), "channels that lie last"),
    "9 channels": (torch.zeros(1, 9, 4, 4).to(memory_format=LAST), (2, 2), (0, 0), "a multiple of 8 of them"),
    "tall": (IMAGES, (8, 1), (0, 0), "up to 7 taps an axis"),
    "wide": (IMAGES, (1, 8), (0, 0), "up to 7 taps an axis"),
    "larger than the image": (IMAGES, (10, 1), (0, 0), "torch says what is wrong with it"),
    "padding alone": (IMAGES, (3, 3), (2, 0), "torch says what is wrong with it"),
    "large": (
        torch.empty(2**15, 8, 2**7, 2**6, device="meta").to(memory_format=LAST), (2, 2), (0, 0), "fewer than 2**31"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("x", "kernel", "padding", "reason"), UNPOOLED.values(), ids=UNPOOLED)
def test_what_the_pool_is_not_made_for_is_a_sentence(
    x: Tensor, kernel: tuple[int, int], padding: tuple[int, int], reason: str
) -> None:
    assert reason in str(kernels("triton_pool").why_not(x, kernel, (2, 2), padding, ONE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("held", ["bias", "residual", "both", "neither"])
def test_an_epilogue_in_place_is_bias_residual_and_activation(held: str, activation: str, dtype: torch.dtype) -> None:
    shape = (2, 13, 9, 7)  # more numbers than a program, and not a multiple
    y, residual = (random(*shape, dtype=dtype).to(memory_format=LAST) for _ in range(2))
    bias = random(13, dtype=dtype)
    b, r = bias if held in ("bias", "both") else None, residual if held in ("residual", "both") else None
    exact = y if b is None else y + b.view(-1, 1, 1)
    exact = reference.activate(exact if r is None else exact + r, activation, 0.2)
    tensors = (None if t is None else t.to(DEVICE, dtype) for t in (b, r))
    here = y.to(DEVICE, dtype)
    done = kernels("triton_epilogue").finish_in_place(here, *tensors, activation, 0.2)
    assert done.data_ptr() == here.data_ptr()
    error = (done.cpu() - exact).abs().max()
    assert error <= 2 * torch.finfo(dtype).eps * exact.abs().max()


def test_an_epilogue_takes_a_residual_and_a_bias_that_lie_otherwise() -> None:
    y, residual = torch.randn(2, 8, 5, 3).to(memory_format=LAST), torch.randn(2, 8, 5, 3)
    bias = torch.randn(8, 2)[:, 0]
    expected = F.relu(y + bias.view(-1, 1, 1) + residual)
    tensors = (t.to(DEVICE) for t in (y.clone(memory_format=torch.preserve_format), bias, residual))
    torch.testing.assert_close(kernels("triton_epilogue").finish_in_place(*tensors, "relu", 0.0).cpu(), expected)


def test_an_epilogue_lets_nan_and_infinity_through_where_they_are() -> None:
    y = torch.zeros(1, 8, 4, 4).to(memory_format=LAST)
    y[0, 1, 2, 3], y[0, 2, 0, 0], y[0, 3, 1, 1] = torch.nan, torch.inf, -torch.inf
    expected = F.relu(y + 1)
    found = kernels("triton_epilogue").finish_in_place(y.to(DEVICE), torch.ones(8, device=DEVICE), None, "relu", 0.0)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("y", "residual", "reason"),
    [
        (torch.zeros(8, 4, 4), None, "channels lie last"),
        (torch.zeros(2, 8, 4, 4), None, "channels lie last"),
        (torch.zeros(0, 8, 4, 4).to(memory_format=LAST), None, "fewer than 2**31 numbers"),
        (torch.empty(2**15, 8, 2**7, 2**6, device="meta").to(memory_format=LAST), None, "fewer than 2**31 numbers"),
        (torch.zeros(2, 8, 4, 4, dtype=torch.float64).to(memory_format=LAST), None, "not float64"),
        (torch.zeros(2, 8, 4, 4).to(memory_format=LAST), torch.zeros(8, 1, 1), "the shape and the dtype of the output"),
        (torch.zeros(2, 8, 4, 4).to(memory_format=LAST), torch.zeros(2, 8, 4, 4).half(), "and the dtype of the output"),
    ],
    ids=["no batch", "contiguous", "empty", "too large", "float64", "residual broadcasts", "residual in float16"],
)
def test_what_cannot_be_finished_in_place_is_a_sentence(y: Tensor, residual: Tensor | None, reason: str) -> None:
    assert reason in str(kernels("triton_epilogue").why_not_in_place(y, residual))


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions below that `dense.conv` and `max_pool2d` come to call, as on a GPU with Triton."""
    called: list[str] = []

    def note(module: Any, name: str) -> None:
        function = getattr(module, name)

        def noting(*arguments: Any) -> Any:
            called.append(name)
            return function(*arguments)

        monkeypatch.setattr(module, name, noting)

    for module in (dense, pooling):
        monkeypatch.setattr(module, "runs_triton", lambda _: True)
    note(kernels("triton_stem"), "conv")
    note(kernels("triton_grouped"), "conv")
    note(kernels("triton_pool"), "max_pool")
    note(kernels("triton_epilogue"), "finish_in_place")
    return called


def here(tensor: Tensor) -> Tensor:
    return tensor.to(DEVICE) if GPU else on_a_gpu(tensor)


def dense_conv(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    b, r = (None if t is None else t.to(DEVICE) for t in (bias, residual))
    return dense.conv(here(x), weight.to(DEVICE), b, r, ONE, ONE, ONE, 1, activation, 0.01)


@torch.inference_mode()
def test_a_conv_of_few_channels_takes_its_kernel(noted: list[str]) -> None:
    x, weight, bias = (t.half() for t in (torch.randn(2, 3, 6, 5), torch.randn(8, 3, 3, 3), torch.randn(8)))
    y = dense_conv(x, weight, bias, None, "silu")
    assert noted == ["conv"]
    expected = F.silu(F.conv2d(x.double(), weight.double(), bias.double(), padding=1))
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-3, atol=1e-2)


@torch.inference_mode()
def test_a_conv_of_few_channels_a_group_takes_its_kernel_and_pools_afterwards(noted: list[str]) -> None:
    x, weight, bias = (t.half() for t in (torch.randn(2, 32, 6, 5), torch.randn(32, 4, 3, 3), torch.randn(32)))
    own, spread = dense.layout(here(weight), 8)
    y = dense.conv(here(x), own, bias.to(DEVICE), None, ONE, ONE, ONE, 8, "relu", 0.0, 2, spread)
    assert noted[0] == "conv"
    expected = F.max_pool2d(F.relu(F.conv2d(x.double(), weight.double(), bias.double(), padding=1, groups=8)), 2)
    torch.testing.assert_close(y.cpu().as_subclass(Tensor).double(), expected, rtol=1e-3, atol=1e-2)


@torch.inference_mode()
def test_weights_that_no_grouped_kernel_reads_lie_once(noted: list[str]) -> None:
    for weight, groups in ((torch.randn(32, 4, 3, 3), 8), (torch.randn(32, 32, 3, 3).half(), 1)):
        assert len(dense.layout(here(weight), groups)) == 1


@pytest.mark.parametrize("held", ["bias", "residual", "both"])
@torch.inference_mode()
def test_what_cudnn_does_not_fuse_ends_in_one_kernel(noted: list[str], held: str) -> None:
    x, weight = torch.randn(2, 16, 6, 5).to(memory_format=LAST), torch.randn(8, 16, 3, 3).to(memory_format=LAST)
    bias = torch.randn(8) if held != "residual" else None
    residual = torch.randn(2, 8, 6, 5) if held != "bias" else None
    y = dense_conv(x, weight, bias, residual, "silu")
    assert noted == ["finish_in_place"]
    expected = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    expected = F.silu(expected if residual is None else expected + residual)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-2 if GPU else 1e-5, atol=1e-2 if GPU else 1e-4)


@torch.inference_mode()
def test_an_epilogue_that_fits_no_kernel_is_torchs(noted: list[str]) -> None:
    x, weight = torch.randn(2, 16, 6, 5).to(memory_format=LAST), torch.randn(8, 16, 3, 3).to(memory_format=LAST)
    bias, broadcast = torch.randn(8), torch.randn(8, 1, 1)
    y = dense_conv(x, weight, bias, broadcast, "silu")
    assert noted == []
    expected = F.silu(F.conv2d(x.double(), weight.double(), bias.double(), padding=1) + broadcast)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-2 if GPU else 1e-5, atol=1e-2 if GPU else 1e-4)


def test_what_learns_takes_torchs_conv_and_pool(noted: list[str]) -> None:
    x, weight = torch.randn(2, 3, 6, 5).half(), torch.randn(8, 3, 3, 3).half().to(DEVICE).requires_grad_()
    y = dense_conv(x, weight, None, None, "relu")
    pooling.max_pool2d(here(y), (2, 2), (2, 2), (0, 0), ONE).sum().backward()
    assert noted == []
    assert weight.grad is not None


@torch.inference_mode()
def test_a_pool_of_channels_that_lie_last_takes_its_kernel_and_others_do_not(noted: list[str]) -> None:
    x = torch.randn(2, 8, 6, 5)
    found = [pooling.max_pool2d(here(t), (2, 2), (2, 2), (0, 0), ONE) for t in (x, x.to(memory_format=LAST))]
    assert noted == ["max_pool"]
    assert all(torch.equal(y.cpu(), F.max_pool2d(x, 2)) for y in found)


@torch.inference_mode()
def test_a_pool_larger_than_the_image_is_torchs_error(noted: list[str]) -> None:
    x = here(torch.randn(2, 8, 3, 3).to(memory_format=LAST))
    with pytest.raises(RuntimeError, match="too small"):
        pooling.max_pool2d(x, (4, 4), (4, 4), (0, 0), ONE)
