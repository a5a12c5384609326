"""prepare: what it rewrites, what stays, and what it refuses."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import fxdbsr
from fxdbsr.layers import blocked_layers
from fxdbsr.nn.scaled import ScaledLayer
from fxdbsr.traced import TwoGraphModule


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.w = nn.Parameter(torch.randn(12, 3, 3, 3))
        self.conv = nn.Conv2d(12, 12, 3, padding=1)
        self.unread = nn.Parameter(torch.zeros(3))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, self.inner.w, None, padding=1))  # type: ignore[arg-type]
        y = self.conv(y) + self.conv(2 * y) + torch.ones(1)
        z: Tensor = y + F.conv2d(y, self.conv.weight, stride=1, padding="same")
        return z


class Branchy(nn.Module):
    """Another graph in training than in evaluation, as auxiliary heads make it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.auxiliary = nn.Conv2d(8, 4, 1)
        self.shift = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        y = self.trunk(x) + self.shift + self.count
        if self.training:
            return self.head(y), self.auxiliary(y)
        return self.head(y)


def convs() -> list[nn.Module]:
    return [
        nn.Conv2d(3, 40, 7, stride=2, padding=3),
        nn.Conv2d(8, 12, (3, 5), padding="same", padding_mode="circular", bias=False),
        nn.Conv2d(8, 12, 3, padding="valid", dilation=2),
        nn.Conv2d(8, 12, 4, padding="same"),
        nn.Conv2d(12, 24, 3, groups=4, padding_mode="reflect", padding=(1, 2)),
        nn.Conv2d(20, 20, 3, groups=20, padding=1),
        nn.Conv2d(20, 40, 3, groups=20),
        nn.Conv1d(6, 10, 3),
        nn.Conv3d(4, 6, (1, 3, 3)),
        nn.ConvTranspose1d(6, 10, 3, stride=2),
        nn.ConvTranspose2d(6, 10, 3, stride=2, output_padding=1, groups=2),
        nn.ConvTranspose3d(4, 6, 2),
    ]


def example(conv: Any) -> Tensor:
    axes = conv.weight.dim() - 2
    return torch.randn(2, conv.in_channels, *[9] * axes)


@pytest.mark.parametrize("form", ["product", "clamp"])
@pytest.mark.parametrize("block_size", [8, (32, 32), (1, None), (None, 1), (5, 3)])
def test_outputs_and_gradients_are_equal_while_scales_are_one(block_size: Any, form: str) -> None:
    for conv in convs():
        model = nn.Sequential(conv)
        prepared = fxdbsr.prepare(model, block_size, form=form)
        x = example(conv)
        expected, found = model(x), prepared(x)
        assert torch.equal(found, expected), conv
        expected.square().sum().backward()
        found.square().sum().backward()
        scaled = prepared.get_submodule("0")
        assert torch.equal(scaled.weight.grad, conv.weight.grad), conv  # type: ignore[arg-type]


def test_names_and_values_stay_and_only_scale_and_mask_are_new() -> None:
    model = Functional()
    prepared = fxdbsr.prepare(model, 8)
    before, after = model.state_dict(), prepared.state_dict()
    new = {"inner.w_scale", "inner.w_mask", "conv.scale", "conv.mask"}
    assert set(after) - set(before) == new
    assert all(torch.equal(after[name], before[name]) for name in before)
    found = prepared.load_state_dict(before, strict=False)
    assert set(found.missing_keys) == new
    assert not found.unexpected_keys
    assert [n for n, _ in prepared.named_buffers()].count("hidden") == 1
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(prepared(x), model(x))


def test_functional_convs_are_named_by_their_weight_and_share_its_scale() -> None:
    prepared = fxdbsr.prepare(Functional(), 8)
    layers = {layer.name: layer for layer in blocked_layers(prepared)}
    assert set(layers) == {"conv", "inner.w"}
    assert len(layers["conv"].users) == 2
    prepared(torch.randn(1, 3, 6, 6))
    assert sorted(sum(user.positions) for user in layers["conv"].users) == [36, 72]


def test_modules_that_share_a_weight_share_a_scale() -> None:
    a, b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    b.weight = a.weight
    prepared = fxdbsr.prepare(nn.Sequential(a, b), 2)
    first, second = prepared.get_submodule("0"), prepared.get_submodule("1")
    assert first.scale is second.scale
    (layer,) = blocked_layers(prepared)
    layer.set_mask(torch.zeros(2, 2, dtype=torch.bool))
    assert not second.mask.any()  # type: ignore[operator]


def test_training_and_evaluation_keep_their_own_graphs() -> None:
    model = Branchy()
    prepared = fxdbsr.prepare(model, 4)
    assert isinstance(prepared, TwoGraphModule)
    assert set(model.state_dict()) <= set(prepared.state_dict())
    x = torch.randn(2, 3, 6, 6)
    for mode in (True, False, False, True):
        expected, found = model.train(mode)(x), prepared.train(mode)(x)
        if mode:
            assert torch.equal(found[1], expected[1])
            found, expected = found[0], expected[0]
        assert torch.equal(found, expected)
    assert len(blocked_layers(prepared)) == 3


class Strided(nn.Module):
    """Calls one weight with other arguments in training than in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = F.conv2d(x, self.w, stride=2, padding=1)
        return F.conv2d(x, self.w, padding=1)


def test_functional_convs_keep_the_arguments_of_each_mode() -> None:
    model, x = Strided(), torch.randn(2, 8, 9, 9)
    prepared = fxdbsr.prepare(model, 4)
    for mode in (True, False, True):
        assert torch.equal(prepared.train(mode)(x), model.train(mode)(x))
    assert len(blocked_layers(prepared)[0].users) == 2


class Constant(nn.Module):
    """Reads tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shift = nn.Conv2d(3, 4, 1), torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x) + self.shift + torch.ones(1)
        return y


def test_constants_need_no_second_graph() -> None:
    model, x = Constant(), torch.randn(2, 3, 4, 4)
    prepared = fxdbsr.prepare(model)
    assert isinstance(prepared, fx.GraphModule)
    assert torch.equal(prepared(x), model(x))
    assert list(prepared.state_dict()) == ["conv.weight", "conv.bias", "conv.scale", "conv.mask"]


class Taken(nn.Module):
    """Holds scales of its own, under the names that block scales would take."""

    class Scaling(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(4, 4, 1)
            self.scale = nn.Parameter(torch.randn(4))

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scaling = nn.Conv2d(4, 4, 1), self.Scaling()
        self.w, self.w_scale = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.scaling(self.conv(x)) * self.scaling.scale.view(-1, 1, 1)
        z: Tensor = F.conv2d(y, self.w) * self.w_scale.view(-1, 1, 1)
        return z


def test_layers_whose_names_for_scales_are_taken_stay() -> None:
    model, x = Taken(), torch.randn(2, 4, 3, 3)
    prepared = fxdbsr.prepare(model, 2)
    assert torch.equal(prepared(x), model(x))
    assert [layer.name for layer in blocked_layers(prepared)] == ["conv"]
    reasons = {row.name: row.reason for row in fxdbsr.report(prepared, x).rows}
    assert reasons["scaling"] == "Scaling has another scale"
    assert reasons["w"] == "the names w_scale and w_mask are taken"


@pytest.mark.parametrize("model_type", [Functional, Branchy])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(model_type: type[nn.Module], clone: Any) -> None:
    prepared = fxdbsr.prepare(model_type(), 4).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = prepared(x)
    other = clone(prepared)
    assert list(other.state_dict()) == list(prepared.state_dict())
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.double()
    assert not other(x.double()).any() or model_type is Functional
    assert torch.equal(prepared(x), expected)


def test_the_mode_of_every_module_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8).eval(), nn.ReLU())
    prepared = fxdbsr.prepare(model)
    assert prepared.training
    assert not prepared.get_submodule("1").training
    assert not fxdbsr.prepare(model.eval()).training


def test_in_place_writes_whose_result_nobody_reads_stay() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            y[:, 1:].add_(1)
            y.mul_(2)
            return y

    model, x = Model(), torch.randn(1, 3, 2, 2)
    assert torch.equal(fxdbsr.prepare(model)(x), model(x))
    switched = fxdbsr.convert(fxdbsr.prepare(model), backend="reference")
    torch.testing.assert_close(switched(x), model(x))


def test_augmented_assignments_write_in_place_as_they_do_in_the_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            z = y
            z += 1
            z *= 2
            height = x.shape[2]
            height += 1
            return y + height

    model, x = Model(), torch.randn(1, 3, 2, 2)
    prepared = fxdbsr.prepare(model)
    assert torch.equal(prepared(x), model(x))
    torch.testing.assert_close(fxdbsr.convert(prepared, backend="reference")(x), model(x))


@fx.wrap
def shift_first_channel(x: Tensor) -> None:
    x[:, 0] += 1


def test_wrapped_functions_whose_result_nobody_reads_stay() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            shift_first_channel(y)
            return y + x.sum()

    model, x = Model(), torch.randn(1, 3, 2, 2)
    assert torch.equal(fxdbsr.prepare(model)(x), model(x))
    switched = fxdbsr.convert(fxdbsr.prepare(model), backend="reference")
    torch.testing.assert_close(switched(x), model(x))


class Odd(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Plain(nn.Conv2d):
    pass


def test_subclasses_count_unless_they_change_the_arithmetic() -> None:
    normed = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(Plain(3, 4, 1), Odd(4, 4, 1), parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), normed)
    prepared = fxdbsr.prepare(model, 2)
    assert [layer.name for layer in blocked_layers(prepared)] == ["0", "3"]
    x = torch.randn(1, 3, 2, 2)
    assert torch.equal(prepared(x), model(x))


def test_hooks_of_a_conv_still_run() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(1, 3, 2, 2)
    prepared = fxdbsr.prepare(model)
    assert torch.equal(prepared(x), model(x))
    torch.testing.assert_close(fxdbsr.convert(prepared, backend="reference")(x), model(x))


def triple(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 3 * output


@pytest.mark.parametrize("model_type", [Constant, Branchy])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_hooks_of_the_model_itself_still_run(model_type: type[nn.Module], clone: Any) -> None:
    model, x = model_type().eval(), torch.randn(1, 3, 4, 4)
    model.register_forward_hook(triple)
    prepared = fxdbsr.prepare(model)
    assert torch.equal(prepared(x), model(x))
    assert torch.equal(clone(prepared)(x), model(x))
    torch.testing.assert_close(fxdbsr.convert(prepared, backend="reference")(x), model(x))


def test_a_compiled_model_is_prepared_without_its_wrapper() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1)), torch.randn(1, 3, 4, 4)
    prepared = fxdbsr.prepare(torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    assert list(prepared.state_dict()) == ["0.weight", "0.bias", "0.scale", "0.mask"]
    assert torch.equal(prepared(x), model(x))


def test_filters_types_and_configuration_choose_the_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8, 4))

    def names(**arguments: Any) -> list[str]:
        return [layer.name for layer in blocked_layers(fxdbsr.prepare(model, **arguments))]

    assert names() == ["0", "1"]
    assert names(filter_fn=lambda module, name: module.in_channels > 3) == ["1"]
    assert names(types=(nn.Linear,)) == ["3"]
    assert names(config=fxdbsr.BlockConfig(4, by_name={"0": None, "3": 2})) == ["1", "3"]
    assert names(config=fxdbsr.BlockConfig(4, by_pattern={"0|1": None}), types=(nn.Linear, nn.Conv2d)) == ["3"]


def test_inplace_changes_the_model_itself() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1))
    weight = model[0].weight
    prepared = fxdbsr.prepare(model, inplace=True)
    assert prepared.get_submodule("0") is model[0]
    assert model[0].weight is weight
    assert isinstance(model[0], ScaledLayer)


class Untraceable(nn.Module):
    """Nothing of it can be rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight) if x.sum() > 0 else x


def empty_conv() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, about the initialisation of nothing
        return nn.Sequential(nn.Conv2d(3, 0, 1))


def integer_conv() -> nn.Module:
    conv = nn.Conv2d(3, 4, 1)
    conv.weight = nn.Parameter(torch.ones(4, 3, 1, 1, dtype=torch.int8), requires_grad=False)
    return nn.Sequential(nn.Conv2d(3, 3, 1), conv)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        (Untraceable(), {}, ValueError, "no layer to block: Untraceable cannot be traced by torch.fx in training mode"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), {"block_size": (0, 4)}, ValueError, "block_size: expected"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), {"block_size": 4.0}, TypeError, "block_size: expected"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), {"form": "x"}, ValueError, "form: expected"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), {"types": (nn.ReLU,)}, TypeError, "types: expected conv"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), {"types": nn.Conv2d}, TypeError, "types: expected a list"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), {"filter_fn": "0"}, TypeError, "filter_fn: expected a function"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1)),
            {"config": fxdbsr.BlockConfig(4, by_name={"00": 4})},
            ValueError,
            "no layer '00'; did you mean 0",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), {"config": {}}, TypeError, "config: expected a BlockConfig"),
        (integer_conv(), {}, TypeError, "1: expected floating-point weights, got torch.int8"),
        (nn.Sequential(nn.Conv2d(3, 4, 1, dtype=torch.complex64)), {}, TypeError, "complex64"),
        (nn.Sequential(nn.ReLU()), {}, ValueError, "no layer to block"),
        (nn.Sequential(Odd(3, 4, 1)), {}, ValueError, "0: Odd overrides forward"),
        (empty_conv(), {}, ValueError, r"0: its weight \(0, 3, 1, 1\) is empty"),
    ],
)
def test_bad_input_is_refused_and_the_model_unchanged(
    model: nn.Module, arguments: dict[str, Any], error: type[Exception], message: str, inplace: bool
) -> None:
    kinds = [type(module) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        fxdbsr.prepare(model, inplace=inplace, **arguments)
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_refused_preparation_in_place_leaves_no_attribute() -> None:
    model = Constant()
    attributes, buffers = dict(model.__dict__), dict(model._buffers)
    with pytest.raises(ValueError, match="no layer to block"):
        fxdbsr.prepare(model, types=(nn.Linear,), inplace=True)
    assert dict(model.__dict__) == attributes
    assert dict(model._buffers) == buffers


def test_what_is_not_a_module_or_prepared_already_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got builtin"):
        fxdbsr.prepare(torch.relu)  # type: ignore[arg-type]
    prepared = fxdbsr.prepare(nn.Sequential(nn.Conv2d(3, 4, 1)))
    with pytest.raises(ValueError, match="prepared already"):
        fxdbsr.prepare(prepared)


def test_a_traced_model_is_a_graph_module() -> None:
    assert isinstance(fxdbsr.prepare(nn.Sequential(nn.Conv2d(3, 4, 1))), fx.GraphModule)
