"""Scaled-block layers: the golden vector, the gradients, the clamped form, no mask in memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxdbsr
from fxdbsr.layers import BlockedLayer, blocked_layers
from fxdbsr.nn.scaled import ScaledConv2d
from fxdbsr.nn.scaling import scale_blocks

GOLDEN_SCALE = [[0.5, 0.1], [0.2, 0.3]]
GOLDEN_WEIGHT = [[1, 8, 8, 6], [4, 5, 3, 2], [1, 4, 9, 5], [6, 7, 2, 1]]
GOLDEN_PRODUCT = [[0.5, 4, 0.8, 0.6], [2, 2.5, 0.3, 0.2], [0.2, 0.8, 2.7, 1.5], [1.2, 1.4, 0.6, 0.3]]

LAYERS: list[tuple[str, Any, tuple[int, ...]]] = [
    ("plain", lambda: nn.Conv2d(8, 12, 3, padding=1), (2, 8, 5, 5)),
    ("edges", lambda: nn.Conv2d(6, 10, 3, stride=2, bias=False), (2, 6, 7, 7)),
    ("stem", lambda: nn.Conv2d(3, 8, 5, padding="same"), (2, 3, 6, 6)),
    ("grouped", lambda: nn.Conv2d(12, 12, 3, groups=2), (2, 12, 5, 5)),
    ("depthwise", lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 5)),
    ("one axis", lambda: nn.Conv1d(8, 6, 3, padding=1, padding_mode="reflect"), (2, 8, 9)),
    ("three axes", lambda: nn.Conv3d(5, 6, 2), (2, 5, 3, 4, 3)),
    ("transposed", lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2), (2, 6, 4, 4)),
    ("linear", lambda: nn.Linear(10, 6), (3, 10)),
]


def layer_of(make: Any, form: str = "product", dtype: torch.dtype = torch.float64) -> tuple[nn.Module, BlockedLayer]:
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(dtype)
    prepared = fxdbsr.prepare(model, 4, form=form, types=[type(model[0])])
    (layer,) = blocked_layers(prepared)
    return prepared, layer


def expand(layer: BlockedLayer, scale: Tensor) -> Tensor:
    """`scale` at every weight, entry by entry from the definition."""
    grid, out = layer.grid, torch.empty(layer.grid.out_channels, layer.grid.in_channels // layer.grid.groups)
    out = out.to(scale)
    for row, (top, bottom) in enumerate(grid.rows()):
        for column, (left, right) in enumerate(grid.columns()):
            out[top:bottom, left:right] = scale[row, column]
    return grid.from_out_in(out.reshape(*out.shape, *(1,) * len(grid.kernel_size)).expand(-1, -1, *grid.kernel_size))


def test_the_golden_vector_is_exact_through_a_conv() -> None:
    conv = nn.Conv2d(4, 4, 1, bias=False)
    conv.weight.data.copy_(torch.tensor(GOLDEN_WEIGHT).float().view(4, 4, 1, 1))
    model = fxdbsr.prepare(nn.Sequential(conv), 2)
    fxdbsr.block_scales(model)["0"].data.copy_(torch.tensor(GOLDEN_SCALE))
    columns = model(torch.eye(4).view(4, 4, 1, 1)).view(4, 4).T
    expected = torch.tensor(GOLDEN_SCALE).repeat_interleave(2, 0).repeat_interleave(2, 1) * torch.tensor(GOLDEN_WEIGHT)
    assert torch.equal(columns, expected)
    torch.testing.assert_close(columns, torch.tensor(GOLDEN_PRODUCT), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "make", "shape"), LAYERS, ids=[name for name, *_ in LAYERS])
def test_outputs_are_bit_identical_while_scales_are_one(name: str, make: Any, shape: tuple[int, ...]) -> None:
    prepared, layer = layer_of(make, dtype=torch.float32)
    torch.manual_seed(0)
    plain = make()
    x = torch.randn(shape)
    assert torch.equal(prepared(x), plain(x))
    assert bool((layer.scale == 1).all())


@pytest.mark.parametrize("form", ["product", "clamp", "mask"])
@pytest.mark.parametrize(("name", "make", "shape"), LAYERS, ids=[name for name, *_ in LAYERS])
def test_transforms_give_the_same_gradients(name: str, make: Any, shape: tuple[int, ...], form: Any) -> None:
    """A CPU has a backward of its own; torch.func, compiled steps and other devices have torch's."""
    model, layer = layer_of(make, form)
    nn.init.normal_(layer.scale, 0.5, 1.0)
    layer.set_mask(torch.rand(layer.grid.shape) > 0.3)
    x = torch.randn(shape, dtype=torch.float64)
    trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        y: Tensor = torch.func.functional_call(model, parameters, (x,))
        return y.square().sum()

    found, value = torch.func.grad_and_value(loss)(trained)
    model(x).square().sum().backward()
    assert ("0.scale" in found) == (form != "mask")
    torch.testing.assert_close(value, model(x).square().sum())
    for key, parameter in trained.items():
        torch.testing.assert_close(found[key], parameter.grad)


class Operators(TorchDispatchMode):
    """Counts the operators that are called."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_of_whole_blocks_asks_for_few_operators(device: str) -> None:
    """A small GPU step is as long as the host takes to call them."""
    plain = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)]).to(device)
    x, counts = torch.randn(1, 8, 6, 6, device=device), []
    for model in (plain, fxdbsr.prepare(plain, 4)):
        model(x).sum().backward()  # records positions
        with Operators() as operators:  # type: ignore[no-untyped-call]
            model(x).sum().backward()
        counts.append(operators.count)
    assert counts[1] - counts[0] <= 4 * 13


@pytest.mark.parametrize(("device", "own"), [("cpu", True), ("meta", False)])
def test_only_a_cpu_has_a_backward_of_its_own(device: str, own: bool) -> None:
    _, layer = layer_of(lambda: nn.Conv2d(8, 12, 3))
    weight, scale, mask = (tensor.to(device) for tensor in (layer.weight, layer.scale, layer.mask))
    scaled = scale_blocks(weight, scale, mask, layer.grid, "product")
    assert scaled.grad_fn is not None
    assert ("ScaleBlocks" in scaled.grad_fn.name()) == own


def test_a_scaled_weight_may_be_read_by_anything() -> None:
    """Two readers get the same gradient from a sum: neither may write into it."""
    prepared, layer = layer_of(lambda: nn.Conv2d(8, 12, 3))
    layer.set_mask(torch.rand(layer.grid.shape) > 0.5)
    (conv,) = (module for module in prepared.modules() if isinstance(module, ScaledConv2d))
    other = torch.zeros_like(layer.weight, requires_grad=True)
    read_last = other.exp()
    (conv.scaled_weight() + read_last).square().sum().backward()
    assert other.grad is not None
    assert torch.equal(other.grad, 2 * (layer.grid.scale(layer.weight, layer.scale * layer.mask) + 1))


@pytest.mark.parametrize(("name", "make", "shape"), LAYERS, ids=[name for name, *_ in LAYERS])
def test_a_model_prepared_on_meta_is_as_new_after_reset_parameters(
    name: str, make: Any, shape: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        bare = nn.Sequential(make())
        prepared = fxdbsr.prepare(bare, 4, types=[type(bare[0])])
    prepared.to_empty(device="cpu")
    for tensor in (*prepared.parameters(), *prepared.buffers()):
        tensor.detach().zero_()
    torch.manual_seed(0)
    for module in prepared.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    torch.manual_seed(0)
    plain, x = nn.Sequential(make()), torch.randn(shape)
    assert torch.equal(prepared(x), plain(x))


@pytest.mark.parametrize("form", ["product", "clamp"])
@pytest.mark.parametrize(("name", "make", "shape"), LAYERS, ids=[name for name, *_ in LAYERS])
def test_outputs_and_gradients_equal_the_formula(name: str, make: Any, shape: tuple[int, ...], form: str) -> None:
    """dL/dW = s * dL/dW_s, dL/ds = block sum of W * dL/dW_s, also where the clamp holds."""
    model, layer = layer_of(make, form)
    nn.init.normal_(layer.scale, 0.5, 1.0)
    mask = torch.rand(layer.grid.shape) > 0.3
    layer.set_mask(mask)
    x, plain = torch.randn(shape, dtype=torch.float64), make().to(torch.float64)
    plain.load_state_dict(model.state_dict(prefix=""), strict=False)
    plain.load_state_dict({k[2:]: v for k, v in model.state_dict().items() if k in ("0.weight", "0.bias")})
    scale = layer.scale.detach()
    s = (scale.clamp(0, 1) if form == "clamp" else scale) * mask
    weight = layer.weight.detach()
    plain.weight.data.copy_(expand(layer, s) * weight)

    y, expected = model(x), plain(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(y)
    torch.autograd.backward(y, direction)
    torch.autograd.backward(expected, direction)
    gradient = plain.weight.grad
    assert gradient is not None
    torch.testing.assert_close(layer.weight.grad, expand(layer, s) * gradient, rtol=1e-10, atol=1e-10)
    blocks = torch.zeros_like(scale)
    product = layer.grid.to_out_in(weight * gradient)
    for row, (top, bottom) in enumerate(layer.grid.rows()):
        for column, (left, right) in enumerate(layer.grid.columns()):
            blocks[row, column] = product[top:bottom, left:right].sum()
    torch.testing.assert_close(layer.scale.grad, blocks * mask, rtol=1e-10, atol=1e-10)


def test_the_clamped_form_zeroes_below_0_and_caps_at_1() -> None:
    model, layer = layer_of(lambda: nn.Conv2d(4, 12, 1, bias=False), "clamp")
    layer.scale.data.copy_(torch.tensor([[-2.0], [0.25], [7.0]]))
    product = layer.grid.scale(layer.weight, torch.tensor([[0.0], [0.25], [1.0]]))
    torch.testing.assert_close(model(torch.eye(4).double().view(4, 4, 1, 1)).view(4, 12).T, product.view(12, 4))
    assert layer.alive().flatten().tolist() == [False, True, True]


def test_masked_blocks_get_no_gradient_and_unmasked_zeros_do() -> None:
    model, layer = layer_of(lambda: nn.Conv2d(4, 8, 1, bias=False))
    layer.scale.data.zero_()
    layer.mask[0] = False
    torch.autograd.backward(model(torch.randn(2, 4, 3, 3, dtype=torch.float64)).sum())
    gradient = layer.scale.grad
    assert gradient is not None
    assert gradient[0] == 0
    assert gradient[1] != 0
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()


def test_second_derivatives_agree_with_finite_differences() -> None:
    model, layer = layer_of(lambda: nn.Conv2d(4, 6, 1, bias=False))
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)

    def output(weight: Tensor, scale: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(model, {"0.weight": weight, "0.scale": scale}, (x,))
        return y.square()

    inputs = (layer.weight.detach().requires_grad_(), layer.scale.detach().requires_grad_())
    assert torch.autograd.gradgradcheck(output, inputs)


class Allocations(TorchDispatchMode):
    """Counts the tensors of at least `numel` elements that operators make anew, in memory of their own."""

    def __init__(self, numel: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel, self.made = numel, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            fresh = isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given
            self.made += fresh and t.untyped_storage().nbytes() >= self.numel * t.element_size()
        return result


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("form", ["product", "clamp"])
def test_the_product_is_the_only_tensor_as_large_as_the_weight(form: str, memory_format: Any) -> None:
    model, layer = layer_of(lambda: nn.Conv2d(64, 96, 3), form, torch.float32)
    model.to(memory_format=memory_format)
    x = torch.randn(1, 64, 3, 3).to(memory_format=memory_format)
    with Allocations(layer.weight.numel()) as allocations:
        model(x)
    assert allocations.made == 1


def test_the_product_keeps_the_memory_format_of_the_weight() -> None:
    _, layer = layer_of(lambda: nn.Conv2d(64, 96, 3), dtype=torch.float32)
    layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    assert layer.grid.scale(layer.weight, layer.scale).is_contiguous(memory_format=torch.channels_last)


def test_compiled_without_graph_breaks_it_computes_the_same() -> None:
    model, layer = layer_of(lambda: nn.Conv2d(6, 10, 3), "clamp", torch.float32)
    nn.init.normal_(layer.scale)
    x = torch.randn(2, 6, 5, 5)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    y, expected = compiled(x), model(x)
    torch.testing.assert_close(y, expected)
    torch.autograd.backward(y.square().sum())
    torch.autograd.backward(expected.square().sum())
    (other,) = blocked_layers(compiled)  # type: ignore[arg-type]
    torch.testing.assert_close(other.scale.grad, layer.scale.grad)
