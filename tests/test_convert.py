"""convert: equal outputs on every construct, the rewrites counted, and bad input."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxdbsr
from bench.coverage import BOUND, check_model, enliven, first_tensor
from fxdbsr.graph import called_module
from fxdbsr.layers import blocked_layers
from fxdbsr.nn.packed import PackedConv
from fxdbsr.passes import CONVERT, run
from fxdbsr.passes.lowering import Lowering

ZOO = [
    "resnet18",
    "resnext50_32x4d",
    "vgg11_bn",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "densenet121",
    "googlenet",
    "inception_v3",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "regnet_x_400mf",
    "swin_t",
    "r3d_18",
    "lraspp_mobilenet_v3_large",
]


@pytest.mark.parametrize("name", ZOO)
def test_torchvision_models_stay_equal(name: str) -> None:
    outcome = check_model(name, ("reference", "auto"), size=96)
    assert outcome.unchanged
    assert outcome.input_effect > 1e-3
    for backend, error in outcome.errors.items():
        assert error <= outcome.bound, backend


class Net(nn.Module):
    """Every kind of epilogue and of reader that a conv can have."""

    def __init__(self) -> None:
        super().__init__()

        def conv(i: int, o: int, **kwargs: Any) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, **({"kernel_size": 3, "padding": 1} | kwargs)), nn.BatchNorm2d(o))

        self.stem = conv(3, 16)
        self.a, self.b = conv(16, 16), conv(16, 16, bias=False)
        self.shortcut = conv(16, 16, kernel_size=1, padding=0)
        self.grouped = conv(16, 24, groups=4, padding_mode="reflect")
        self.depthwise = conv(24, 24, groups=24, padding="same")
        self.shared = nn.Conv2d(24, 24, 1)
        self.norm = nn.BatchNorm2d(24)
        self.up = nn.ConvTranspose2d(24, 8, 2, stride=2)
        self.silu, self.leaky = nn.SiLU(inplace=True), nn.LeakyReLU(0.2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x), inplace=True)
        y = F.relu6(self.a(x))
        y = self.b(y)
        y += self.shortcut(x)
        y = torch.relu(y)
        y = self.silu(self.grouped(y))
        y = self.leaky(self.depthwise(y) + y)
        y = self.norm(self.shared(y)) + F.hardswish(self.shared(y))
        y = torch.sigmoid(self.up(y))
        logits: Tensor = self.fc(y.mean((2, 3)))
        return logits


def prepared_net(model: nn.Module, inputs: Tensor, keep: float = 0.5, seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    prepared = fxdbsr.prepare(model, **({"block_size": (8, 4)} | kwargs))
    generator = torch.Generator().manual_seed(seed)
    for layer in blocked_layers(prepared):
        layer.set_mask(torch.rand(layer.mask.shape, generator=generator) < keep)
        layer.scale.data.uniform_(0.5, 1.5, generator=generator)
    enliven(prepared, inputs, generator)
    return prepared.eval()


def graph_of(model: nn.Module) -> fx.Graph:
    assert isinstance(model, fx.GraphModule)
    return model.graph


def worst(converted: nn.Module, prepared: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected, found = first_tensor(prepared(x)), first_tensor(converted(x))
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("backend", ["reference", "dense", "auto"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_every_epilogue_stays_equal(backend: str, keep: float) -> None:
    x = torch.randn(2, 3, 12, 12)
    prepared = prepared_net(Net(), x, keep)
    converted = fxdbsr.convert(prepared, backend=backend)
    assert worst(converted, prepared, x) <= BOUND
    assert worst(converted, prepared, torch.randn(3, 3, 17, 8)) <= BOUND


def test_rewrites_are_counted() -> None:
    x = torch.randn(2, 3, 12, 12)
    converted = fxdbsr.convert(prepared_net(Net(), x), backend="reference")
    layers = {n.target: m for n in graph_of(converted).nodes if isinstance(m := called_module(n), PackedConv)}
    activations = {str(name).partition(".")[0]: layer.activation for name, layer in layers.items()}
    assert activations == {
        "stem": "relu",
        "a": "relu6",
        "b": "relu",
        "shortcut": "none",
        "grouped": "silu",
        "depthwise": "leaky_relu",
        "shared": "none",
        "up": "sigmoid",
    }
    norms = [m for m in converted.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 1, "only the norm behind the conv that is called twice stays"
    residuals = [n for n in graph_of(converted).nodes if n.target in layers and len(n.args) == 2]
    assert len(residuals) == 2


@pytest.mark.parametrize("count", range(1, len(CONVERT) + 1))
def test_after_every_pass_the_model_runs_and_computes_the_same(count: int) -> None:
    x = torch.randn(2, 3, 12, 12)
    prepared = prepared_net(Net(), x)
    model = copy.deepcopy(prepared)
    assert isinstance(model, fx.GraphModule)
    run(CONVERT[:count], model, Lowering("reference"))
    assert worst(model, prepared, x) <= BOUND


def test_a_value_with_another_reader_is_not_fused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return F.relu(y), self.norm(y)

    x = torch.randn(2, 3, 4, 4)
    prepared = prepared_net(Model(), x, keep=1.0)
    converted = fxdbsr.convert(prepared, backend="reference")
    layer = converted.get_submodule("conv")
    assert isinstance(layer, PackedConv)
    assert layer.activation == "none"
    assert all(torch.allclose(a, b) for a, b in zip(converted(x), prepared(x), strict=True))


def test_an_add_that_writes_into_another_value_is_not_fused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            z = 2 * x
            z.add_(self.conv(x))
            return z * z

    x = torch.randn(2, 3, 4, 4)
    prepared = prepared_net(Model(), x, keep=1.0)
    assert worst(fxdbsr.convert(prepared, backend="reference"), prepared, x) <= BOUND


def test_an_input_overwritten_between_conv_and_add_is_not_fused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = 2 * x
            y: Tensor = self.conv(x)
            return y + F.relu(x, True)

    x = torch.randn(2, 3, 4, 4)
    prepared = prepared_net(Model(), x, keep=1.0)
    assert worst(fxdbsr.convert(prepared, backend="reference"), prepared, x) <= BOUND


@pytest.mark.parametrize("backend", [None, "reference", "auto"])
def test_to_dense_gives_back_ordinary_layers_that_compute_the_same(backend: str | None) -> None:
    x = torch.randn(2, 3, 12, 12)
    prepared = prepared_net(Net(), x)
    model = prepared if backend is None else fxdbsr.convert(prepared, backend=backend)
    dense = fxdbsr.to_dense(model)
    assert worst(dense, prepared, x) <= BOUND
    leaves = [m for m in dense.modules() if not list(m.children())]
    assert all(type(m).__module__.startswith("torch.nn") for m in leaves)
    assert worst(model, prepared, x) <= BOUND
    with pytest.raises(ValueError, match="expected a prepared or converted model"):
        fxdbsr.to_dense(Net())


@pytest.mark.parametrize("backend", ["reference", "dense"])
def test_residuals_that_broadcast_stay_right(backend: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3)
            self.shift = nn.Parameter(torch.randn(1, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x.mean((2, 3), keepdim=True)) + x
            return F.relu(self.b(y) + self.shift) + x.size(0)

    x = torch.randn(2, 3, 6, 6)
    prepared = prepared_net(Model(), x, keep=1.0, block_size=2)
    assert worst(fxdbsr.convert(prepared, backend=backend), prepared, x) <= BOUND


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("layer", "size", "shape"),
    [
        *((nn.Conv1d(4, 4, 1), (2, 4, 6), shape) for shape in ((), (6,), (4, 1), (2, 4, 6))),
        *((nn.Linear(4, 4), (2, 3, 4), shape) for shape in ((), (4,), (3, 1), (2, 1, 1), (2, 3, 4))),
        (nn.Linear(4, 4), (3, 4), (1, 3, 4)),
        (nn.ConvTranspose2d(4, 4, 2, 2), (2, 4, 3, 3), (6,)),
    ],
    ids=str,
)
@torch.no_grad()
def test_layers_that_become_2d_convs_take_residuals_that_broadcast(
    layer: nn.Module, size: tuple[int, ...], shape: tuple[int, ...], backend: str
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.shift = layer, nn.Parameter(torch.randn(shape))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.layer(x) + self.shift)

    x = torch.randn(size)
    prepared = fxdbsr.prepare(Model().eval(), 2, types=(type(layer),))
    torch.testing.assert_close(fxdbsr.convert(prepared, backend=backend)(x), prepared(x))


@torch.no_grad()
def test_transposed_convs_whose_calls_choose_the_size_stay() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.same = nn.ConvTranspose2d(4, 4, 2, 2), nn.ConvTranspose2d(4, 4, 3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x, output_size=[2 * x.shape[2], 2 * x.shape[3]])
            z: Tensor = self.same(y, [y.shape[2], y.shape[3]])
            return z

    x = torch.randn(2, 4, 5, 6)
    prepared = fxdbsr.block_prune_(fxdbsr.prepare(Model().eval(), 2), 0.5)
    converted = fxdbsr.convert(prepared)
    torch.testing.assert_close(converted(x), prepared(x))
    assert [row.reason for row in fxdbsr.report(converted, x).rows] == ["its calls choose the size of their output"] * 2


def test_modules_called_by_keyword_convert() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.relu(input=self.norm(input=self.conv(input=x)) + x)
            return y

    x = torch.randn(2, 3, 12, 12)
    prepared = prepared_net(Model(), x)
    converted = fxdbsr.convert(prepared, tune=True, example_inputs=x)
    assert worst(converted, prepared, x) <= BOUND
    assert [node.op for node in graph_of(converted).nodes] == ["placeholder", "call_module", "output"]


def test_a_norm_with_hooks_is_not_folded() -> None:
    norm = nn.BatchNorm2d(16)
    norm.register_forward_hook(lambda module, args, output: 3 * output)
    x = torch.randn(2, 3, 12, 12)
    prepared = prepared_net(nn.Sequential(nn.Conv2d(3, 16, 3), norm), x)
    assert worst(fxdbsr.convert(prepared, backend="reference"), prepared, x) <= BOUND


class Reader(nn.Module):
    """Reads tensors of its layers by name, and calls convs on biases that are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.w, self.b = nn.Parameter(torch.randn(16, 16, 1, 1)), nn.Parameter(torch.randn(16))
        self.register_buffer("c", torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)) * self.conv.weight.square().mean() + self.conv.bias.view(-1, 1, 1)  # type: ignore
        y = F.conv2d(y, self.w, self.c)  # type: ignore[arg-type]
        return F.conv2d(y, self.w.flip(0), self.b) + F.conv2d(y, self.w, 2 * self.b)


@pytest.mark.parametrize("backend", ["reference", "dense", "auto"])
def test_tensors_that_the_model_reads_itself_stay_as_they_were(backend: str) -> None:
    x = torch.randn(2, 3, 12, 12)
    prepared = prepared_net(Reader(), x, 0.8)
    assert [layer.name for layer in blocked_layers(prepared)] == ["conv", "w"]
    assert worst(fxdbsr.convert(prepared, backend=backend), prepared, x) <= BOUND


def test_a_value_overwritten_by_a_spelled_out_operator_is_not_fused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            return y + x.__imul__(2)

    x = torch.randn(2, 3, 4, 4)
    prepared = fxdbsr.prepare(Model()).eval()
    converted = fxdbsr.convert(prepared, backend="reference")
    torch.testing.assert_close(converted(x.clone()), prepared(x.clone()))


def test_an_ordinary_model_that_traces_in_eval_mode_alone_converts() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            if self.training and x.sum() > 0:
                return x
            y: Tensor = self.conv(x)
            return y

    model, x = Model(), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(fxdbsr.convert(model, block_size=4)(x), model.eval()(x))


class Lenet(nn.Module):
    """Flattens by a view, as a classifier of the tutorials does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 16, 3), nn.Linear(16 * 25, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        logits: Tensor = self.fc(x.view(x.size(0), -1))
        return logits


@pytest.mark.parametrize("backend", ["reference", "dense", "auto"])
def test_views_of_a_convs_output_convert(backend: str) -> None:
    x = torch.randn(2, 3, 12, 12)
    prepared = prepared_net(Lenet(), x)
    assert worst(fxdbsr.convert(prepared, backend=backend), prepared, x) <= BOUND


def test_writes_through_a_view_stay() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            y.view(2, 2, 8, 10, 10).mul_(2)
            return y

    x = torch.randn(2, 3, 12, 12)
    prepared = prepared_net(Model(), x)
    assert worst(fxdbsr.convert(prepared, backend="reference"), prepared, x) <= BOUND


@pytest.mark.parametrize("block_size", [(1, None), (None, 1)])
def test_filter_and_channel_sparsity_convert(block_size: Any) -> None:
    x = torch.randn(2, 3, 12, 12)
    prepared = prepared_net(Net(), x, block_size=block_size)
    assert worst(fxdbsr.convert(prepared, backend="reference"), prepared, x) <= BOUND


def test_clamped_scales_convert() -> None:
    x = torch.randn(2, 3, 12, 12)
    prepared = prepared_net(Net(), x, keep=1.0, form="clamp")
    for layer in blocked_layers(prepared):
        layer.scale.data.uniform_(-1, 2)
    converted = fxdbsr.convert(prepared, backend="reference")
    assert worst(converted, prepared, x) <= BOUND
    kept = sum(int(layer.alive().sum()) for layer in blocked_layers(prepared))
    packed = [m for m in converted.modules() if isinstance(m, PackedConv)]
    assert sum(m.col_indices.shape[0] for m in packed) == kept


def test_an_ordinary_model_with_zero_blocks_converts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    with torch.no_grad():
        model.get_parameter("2.weight")[:8, 4:8] = 0
    converted = fxdbsr.convert(model, block_size=(8, 4), backend="reference")
    assert converted.get_buffer("2.col_indices").shape == (7,)
    assert worst(converted, model, torch.randn(2, 3, 8, 8)) <= BOUND


def test_the_prepared_model_stays_as_it_was() -> None:
    x = torch.randn(2, 3, 12, 12)
    prepared = prepared_net(Net(), x)
    state, expected = copy.deepcopy(prepared.state_dict()), prepared(x)
    fxdbsr.convert(prepared, backend="reference")
    assert torch.equal(prepared(x), expected)
    assert all(torch.equal(value, state[name]) for name, value in prepared.state_dict().items())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_converted_models_can_be_copied(clone: Any) -> None:
    x = torch.randn(2, 3, 12, 12)
    converted = fxdbsr.convert(prepared_net(Net(), x), backend="reference")
    other = clone(converted)
    assert torch.equal(other(x), converted(x))
    assert list(other.state_dict()) == list(converted.state_dict())


def test_state_holds_the_packed_blocks_alone() -> None:
    x = torch.randn(2, 3, 12, 12)
    converted = fxdbsr.convert(prepared_net(nn.Sequential(nn.Conv2d(3, 16, 3)), x), backend="dense")
    packed = ["0.values", "0.crow_indices", "0.col_indices", "0.bias"]
    assert list(converted.state_dict()) == ["_extra_state", *packed]


def test_any_size_batch_and_layout_runs_after_convert() -> None:
    x = torch.randn(2, 3, 12, 12)
    prepared = prepared_net(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()), x)
    converted = fxdbsr.convert(prepared, backend="reference")
    for y in (x, x.to(memory_format=torch.channels_last), x[:, :, ::2, 1:], x[:0], x[0]):
        torch.testing.assert_close(converted(y), prepared(y))


def test_gradients_reach_the_inputs() -> None:
    x = torch.randn(2, 3, 12, 12)
    prepared = prepared_net(Net(), x)
    converted = fxdbsr.convert(prepared, backend="reference")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    prepared(a).square().sum().backward()
    converted(b).square().sum().backward()
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_converted_models_compile_without_a_break(backend: str) -> None:
    x = torch.randn(2, 3, 12, 12)
    converted = fxdbsr.convert(prepared_net(Net(), x, block_size=8), backend=backend)
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), converted(x))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_converted_models_export_with_any_batch(backend: str) -> None:
    x = torch.randn(2, 3, 12, 12)
    converted = fxdbsr.convert(prepared_net(Net(), x, block_size=8), backend=backend)
    exported = torch.export.export(converted, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    y = torch.randn(5, 3, 12, 12)
    torch.testing.assert_close(exported.module()(y), converted(y))


def nan_in(what: str) -> nn.Module:
    prepared = fxdbsr.prepare(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), 4)
    prepared.state_dict()[what].view(-1)[0] = float("nan")
    return prepared


@pytest.mark.parametrize("what", ["0.weight", "0.scale", "0.bias", "1.running_var", "1.weight"])
def test_nan_is_refused_by_name(what: str) -> None:
    with pytest.raises(ValueError, match=f"fold_.*{what}: 1 of"):
        fxdbsr.convert(nan_in(what))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "gpu"}, "backend: expected one of"),
        ({"tune": True}, "tune: measuring needs example_inputs"),
        ({"tune": True, "example_inputs": (), "backend": "dense"}, "tune: measuring chooses the engine"),
        ({"block_size": 8}, r"block_size: 0 was prepared with blocks of \(4, 3\), got 8"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    prepared = fxdbsr.prepare(nn.Sequential(nn.Conv2d(3, 8, 3)), 4)
    with pytest.raises(ValueError, match=message):
        fxdbsr.convert(prepared, **arguments)


def test_an_ordinary_model_needs_a_block_size() -> None:
    with pytest.raises(ValueError, match="block_size: required"):
        fxdbsr.convert(nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        fxdbsr.convert(3)  # type: ignore[arg-type]


def test_a_backend_that_cannot_run_raises() -> None:
    prepared = fxdbsr.prepare(nn.Sequential(nn.Conv2d(3, 8, 3)), 4)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here"):
        fxdbsr.convert(prepared, backend="triton")


def test_example_inputs_that_fail_are_named() -> None:
    prepared = fxdbsr.prepare(nn.Sequential(nn.Conv2d(3, 8, 3)), 4)
    with pytest.raises(ValueError, match="tune_engines: example_inputs: the model's forward fails on them"):
        fxdbsr.convert(prepared, tune=True, example_inputs=torch.randn(1, 4, 6, 6))


class Moody(nn.Module):
    """Needs two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return F.relu(self.drop(y) * 2 if self.training else y)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), Moody()])
@pytest.mark.parametrize("is_prepared", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"backend": "triton"}])
def test_a_refused_conversion_in_place_changes_nothing(
    model: nn.Module, is_prepared: bool, arguments: dict[str, Any]
) -> None:
    model = copy.deepcopy(model).train()
    model = fxdbsr.prepare(model, 4) if is_prepared else model
    if is_prepared:
        fxdbsr.block_prune_(model, 0.5)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert norm.running_var is not None
    norm.running_var[3] = torch.nan
    x = torch.randn(2, 3, 6, 6)
    kinds = [(type(module), module.training) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.random.fork_rng():
        expected = copy.deepcopy(model)(x)
    with pytest.raises((ValueError, RuntimeError)):
        fxdbsr.convert(model, inplace=True, block_size=4, **arguments)
    assert [(type(module), module.training) for module in model.modules()] == kinds
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(model(x), expected)


def test_a_converted_model_has_the_name_of_its_class() -> None:
    assert type(fxdbsr.convert(fxdbsr.prepare(Moody(), 4))).__name__ == "Moody"


def test_a_model_of_which_a_part_was_prepared_converts_as_a_whole() -> None:
    x = torch.randn(2, 3, 12, 12)
    model = nn.Sequential(nn.Sequential(fxdbsr.prepare(Moody(), 4)), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    fxdbsr.block_prune_(model, 0.5)
    converted = fxdbsr.convert(model, backend="reference")
    torch.testing.assert_close(converted(x), model(x))
    assert isinstance(converted.get_submodule("0.0.conv"), PackedConv)
