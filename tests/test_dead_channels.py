"""Dead channels: the smallest graph of each construct counted by hand, and equality on whole models."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxdbsr
from bench.coverage import BOUND, build, enliven, first_tensor
from fxdbsr.layers import blocked_layers
from fxdbsr.nn.packed import PackedConv
from fxdbsr.traced import TwoGraphModule

Figures = dict[str, tuple[int, int, int, int]]


def conv(i: int, o: int, k: int = 1, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **({"bias": False} | kwargs))


def converted(model: nn.Module, x: Tensor, rows: Any = (), columns: Any = (), block: Any = 4) -> nn.Module:
    """`model` in float64 with the block rows and columns named switched off, converted and held to be equal."""
    prepared = fxdbsr.prepare(model.double().eval(), block)
    layers = {layer.name: layer for layer in blocked_layers(prepared)}
    for axis, off in ((0, dict(rows)), (1, dict(columns))):
        for name, which in off.items():
            mask = layers[name].mask.clone()
            mask.index_fill_(axis, torch.tensor(which), False)
            layers[name].set_mask(mask)
    found = fxdbsr.convert(prepared, backend="reference")
    with torch.no_grad():
        torch.testing.assert_close(found(x.double()), prepared(x.double()), rtol=1e-10, atol=1e-10)
    return found


def figures(model: nn.Module, x: Tensor) -> Figures:
    """(channels, MACs, parameters, bytes) of every layer.

    Bytes of a packed conv, in float64: 8 a weight in a block and a bias, 4 a block, 4 a row of blocks and one more.
    """
    rows = fxdbsr.report(model, x.double()).rows
    return {r.name: (r.output_shape[1] if r.output_shape else 0, r.macs, r.params, r.bytes) for r in rows}


X = torch.randn(1, 4, 2, 2)


def test_in_a_chain_constants_go_forward_and_unread_channels_backward() -> None:
    model = nn.Sequential(conv(4, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 4))
    found = converted(model, X, rows={"0": [1], "2": [0]}, columns={"4": [0]})
    assert figures(found, X) == {"0": (4, 64, 16, 140), "2": (4, 64, 16, 140), "4": (4, 64, 16, 140)}
    found = converted(model, X, columns={"4": [1], "2": [0]})
    assert figures(found, X) == {"0": (4, 64, 16, 140), "2": (4, 64, 16, 140), "4": (4, 64, 16, 140)}


def test_a_constant_reaches_the_next_bias() -> None:
    model = nn.Sequential(conv(4, 8, bias=True), nn.Sigmoid(), conv(8, 4, bias=True))
    found = converted(model, X, rows={"0": [0]})
    assert figures(found, X) == {"0": (4, 64, 20, 172), "2": (4, 64, 20, 172)}


def test_a_constant_next_to_zero_padding_stays() -> None:
    model = nn.Sequential(conv(4, 8, bias=True), nn.Sigmoid(), conv(8, 4, 3, padding=1))
    found = converted(model, X, rows={"0": [0]})
    assert figures(found, X) == {"0": (8, 64, 24, 208), "2": (4, 1152, 288, 2320)}
    assert "4 constant channels stay" in str(fxdbsr.report(found, X.double()).rows[0].reason)
    found = converted(model, X, rows={"0": [3]}, block=1)
    assert "1 constant channel stays" in str(fxdbsr.report(found, X.double()).rows[0].reason)


def test_zero_next_to_padding_and_constants_next_to_reflections_go() -> None:
    model = nn.Sequential(conv(4, 8), nn.ReLU(), conv(8, 4, 3, padding=1))
    assert figures(converted(model, X, rows={"0": [0]}), X) == {"0": (4, 64, 16, 140), "2": (4, 576, 144, 1164)}
    model = nn.Sequential(conv(4, 8, bias=True), nn.Sigmoid(), conv(8, 4, 3, padding=1, padding_mode="reflect"))
    assert figures(converted(model, X, rows={"0": [0]}), X) == {"0": (4, 64, 20, 172), "2": (4, 576, 148, 1196)}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(4, 8), conv(8, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x), inplace=True)
        y = self.b(x)
        y += x
        out: Tensor = self.c(F.relu(y, inplace=True))
        return out


def test_a_residual_channel_goes_only_if_all_producers_can_drop_it() -> None:
    only_b = converted(Residual(), X, rows={"b": [0]})
    assert figures(only_b, X) == {"a": (8, 128, 32, 276), "b": (8, 128, 32, 276), "c": (4, 128, 32, 272)}
    both = converted(Residual(), X, rows={"a": [0], "b": [0]})
    assert figures(both, X) == {"a": (4, 64, 16, 140), "b": (4, 64, 16, 140), "c": (4, 64, 16, 140)}
    unread = converted(Residual(), X, columns={"b": [1], "c": [1]})
    assert figures(unread, X) == {"a": (4, 64, 16, 140), "b": (4, 64, 16, 140), "c": (4, 64, 16, 140)}


class Cat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(4, 8), conv(4, 8), conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(torch.cat([self.a(x), F.relu(self.b(x))], dim=1))
        return out


def test_a_constant_branch_keeps_the_axes_of_a_single_image() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.branch = conv(4, 8), conv(8, 8, bias=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y: Tensor = x + self.branch(x)
            return y

    model = Net()
    found = converted(model, X, rows={"branch": [0, 1]})
    assert "branch" not in dict(found.named_modules())
    assert model.branch.bias is not None
    torch.testing.assert_close(found(X[0].double()), model.a(X[0].double()) + model.branch.bias[:, None, None])


def test_cat_counts_by_offsets() -> None:
    found = converted(Cat(), X, rows={"b": [0]}, columns={"c": [1]})
    assert figures(found, X) == {"a": (4, 64, 16, 140), "b": (4, 64, 16, 140), "c": (4, 128, 32, 272)}


class CatInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(4, 8), conv(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.cat([x, self.a(x)], 1))
        return y


def test_the_models_input_is_concatenated_by_offsets_and_stays() -> None:
    found = converted(CatInput(), X, rows={"a": [0]}, columns={"b": [0]})
    assert figures(found, X) == {"a": (4, 64, 16, 140), "b": (4, 64, 16, 140)}


class Head(nn.Module):
    def __init__(self, view: bool) -> None:
        super().__init__()
        self.conv, self.fc, self.view = conv(4, 8, bias=True), nn.Linear(32, 3), view

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        out: Tensor = self.fc(
            y.view(y.size(0), -1) if self.view else torch.flatten(F.dropout(y, 0.5, self.training), 1)
        )
        return out


@pytest.mark.parametrize("view", [False, True])
def test_a_channel_before_flatten_is_all_its_features(view: bool) -> None:
    found = converted(Head(view), X, rows={"conv": [1]})
    assert figures(found, X) == {"conv": (4, 64, 20, 172), "fc": (3, 48, 51, 408)}
    row = fxdbsr.report(found, X.double()).rows[1]
    assert (row.macs_dense, row.params_dense, row.weight_shape) == (96, 99, (3, 32))


def test_depthwise_channels_go_together() -> None:
    model = nn.Sequential(conv(4, 8), conv(8, 8, 3, padding=1, groups=8), nn.ReLU6(), conv(8, 4))
    found = converted(model, X, rows={"0": [0]})
    assert figures(found, X) == {"0": (4, 64, 16, 140), "1": (4, 144, 36, 300), "3": (4, 64, 16, 140)}
    found = converted(model, X, columns={"3": [1]})
    assert figures(found, X) == {"0": (4, 64, 16, 140), "1": (4, 144, 36, 300), "3": (4, 64, 16, 140)}


def test_grouped_convs_lose_whole_groups_and_as_many_channels_of_each() -> None:
    model = nn.Sequential(conv(4, 8), conv(8, 16, groups=2), conv(16, 4))
    whole = converted(model, X, columns={"2": [0, 1]})
    assert figures(whole, X) == {"0": (4, 64, 16, 140), "1": (8, 128, 32, 276), "2": (4, 128, 32, 272)}
    each = converted(model, X, columns={"2": [0, 3]})
    assert figures(each, X) == {"0": (8, 128, 32, 276), "1": (8, 128, 32, 276), "2": (4, 128, 32, 272)}
    one = converted(model, X, columns={"2": [0]})
    assert figures(one, X) == {"0": (8, 128, 32, 276), "1": (16, 256, 64, 548), "2": (4, 192, 48, 404)}
    inputs = converted(model, X, rows={"0": [0, 3]}, block=2)
    assert figures(inputs, X) == {"0": (4, 64, 16, 156), "1": (16, 128, 32, 324), "2": (4, 256, 64, 588)}


class Pools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = conv(4, 12, bias=True), nn.Linear(12, 3)
        self.pool = nn.MaxPool2d(3, 1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.pool(self.a(x)), scale_factor=2.0)
        y = F.avg_pool2d(F.relu(y), 3, 1, 1)
        out: Tensor = self.fc(F.adaptive_avg_pool2d(y, 1).flatten(1))
        return out


def test_pools_keep_constants_but_padded_averages_only_zero() -> None:
    model = Pools()
    assert model.a.bias is not None
    with torch.no_grad():
        model.a.bias[:8] = torch.tensor([-1.0] * 4 + [1.0] * 4)
    found = converted(model, X, rows={"a": [0, 1]})
    assert figures(found, X) == {"a": (8, 64, 24, 208), "fc": (3, 24, 27, 216)}


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up, self.b = conv(4, 8), conv(8, 4), conv(4, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.a(x))
        gate = torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))))
        out: Tensor = self.b(gate * y)
        return out


def test_a_zero_channel_takes_its_gate_with_it() -> None:
    found = converted(SqueezeExcite(), X, rows={"a": [0]})
    assert figures(found, X) == {
        "a": (4, 64, 16, 140),
        "down": (4, 16, 16, 140),
        "up": (4, 16, 16, 140),
        "b": (4, 64, 16, 140),
    }


class FactorOfFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.factor = conv(4, 8), nn.Linear(8, 4), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).mean((2, 3)) * self.factor)
        return out


def test_a_parameter_with_one_axis_shrinks_with_the_features_that_it_scales() -> None:
    found = converted(FactorOfFeatures(), X, rows={"a": [0]})
    assert figures(found, X)["a"] == (4, 64, 16, 140)
    assert [tuple(t.shape) for name, t in found.named_buffers() if "tensor" in name] == [(4,)]


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.shared, self.c = conv(4, 8), conv(4, 8), conv(8, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(F.relu(self.shared(self.a(x))) - self.shared(self.b(x)))
        return out


def test_a_shared_layer_loses_what_is_dead_in_every_call() -> None:
    one = converted(Shared(), X, rows={"a": [0]})
    assert figures(one, X) == {
        "a": (8, 64, 16, 144),
        "b": (8, 128, 32, 276),
        "shared": (8, 512, 64, 540),
        "c": (4, 128, 32, 272),
    }
    both = converted(Shared(), X, rows={"a": [0], "b": [0]}, columns={"c": [1]})
    assert figures(both, X) == {
        "a": (4, 64, 16, 140),
        "b": (4, 64, 16, 140),
        "shared": (4, 128, 16, 140),
        "c": (4, 64, 16, 140),
    }


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(4, 8), conv(4, 4), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        left, right = x.chunk(2, dim=1)
        return F.relu(self.b(left)) + F.relu(self.c(right))


def test_channels_are_followed_through_a_shuffle() -> None:
    # shuffled, channels 0 to 7 stand in the order 0 4 1 5 | 2 6 3 7; a's second row of blocks holds 2 and 3
    found = converted(Shuffle(), X, rows={"a": [1]}, block=2)
    assert figures(found, X) == {"a": (6, 96, 24, 232), "b": (4, 64, 16, 156), "c": (4, 32, 8, 84)}
    assert any(n.target is torch.index_select for n in found.graph.nodes)  # type: ignore[union-attr]
    whole = converted(Shuffle(), X, block=2)
    assert not any(n.target is torch.index_select for n in whole.graph.nodes)  # type: ignore[union-attr]


def test_norms_before_convs_shrink() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4))
    enliven(model, torch.randn(8, 4, 2, 2), torch.Generator().manual_seed(0))
    found = converted(model, X, rows={"0": [0]})
    assert figures(found, X) == {"0": (4, 64, 20, 172), "4": (4, 64, 20, 172)}
    norm = found.get_submodule("2")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_features == 4
    assert norm.running_mean is not None
    assert norm.running_mean.shape == (4,)


@pytest.mark.parametrize("block", [(1, None), (None, 1)])
def test_filter_and_channel_sparsity_become_smaller_dense_convs(block: Any) -> None:
    model = nn.Sequential(conv(4, 8, 3), nn.ReLU(), conv(8, 8, 1), nn.ReLU(), conv(8, 4, 1))
    x = torch.randn(1, 4, 4, 4)
    off = {"rows": {"0": [1, 5], "2": [0]}} if block[0] else {"columns": {"2": [1, 5], "4": [0]}}
    found = converted(model, x, block=block, **off)
    size = (1780, 396, 260) if block[0] else (1752, 368, 260)
    assert figures(found, x) == {"0": (6, 864, 216, size[0]), "2": (7, 168, 42, size[1]), "4": (4, 112, 28, size[2])}
    assert all(row.macs == row.macs_run for row in fxdbsr.report(found, x.double()).rows)


def test_removal_that_would_break_up_the_blocks_keeps_whole_blocks() -> None:
    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(4, 2), conv(4, 8), conv(10, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.c(torch.cat([self.a(x), self.b(x)], 1))
            return out

    model = Offset().double()
    prepared = fxdbsr.prepare(model, 4)
    layers = {layer.name: layer for layer in blocked_layers(prepared)}
    with torch.no_grad():
        layers["a"].weight[0] = 0
    layers["c"].set_mask(torch.tensor([[True, False, True], [False, True, False]]))
    before = 4 * 4 + 4 * 2 + 4 * 4
    found = fxdbsr.convert(prepared.eval(), backend="reference")
    torch.testing.assert_close(found(X.double()), prepared(X.double()))
    assert figures(found, X)["c"][2] <= before


class Awkward(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, conv(4, 8, bias=True), conv(8, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        if self.how == "output":
            return self.b(y), y
        if self.how == "in place":
            z = 2 * y
            return self.b(F.relu(y, inplace=True)) + self.b(z) + y.mean()
        if self.how == "late":
            z = self.b(y)
            y.mul_(3)
            return z + self.b(y)
        return self.b(torch.softmax(y, 1))


@pytest.mark.parametrize("how", ["output", "in place", "late", "softmax"])
def test_what_is_not_known_stays_as_it_is(how: str) -> None:
    found = converted(Awkward(how), X, rows={"a": [1]})
    assert found.get_submodule("b").grid.in_channels == 8  # type: ignore[union-attr]


def test_hooked_layers_stay_as_they_are() -> None:
    model = nn.Sequential(conv(4, 8), conv(8, 4)).double().eval()
    prepared = fxdbsr.prepare(model, 4)
    blocked_layers(prepared)[0].set_mask(torch.tensor([[True], [False]]))
    seen: list[Any] = []
    prepared.get_submodule("0").register_forward_hook(lambda m, a, y: seen.append(y.shape))
    found = fxdbsr.convert(prepared, backend="reference")
    torch.testing.assert_close(found(X.double()), prepared(X.double()))
    assert seen == [(1, 8, 2, 2)] * 2


def test_reports_speak_of_the_layer_before_removal() -> None:
    model = nn.Sequential(conv(4, 8, bias=True), nn.ReLU(), nn.ConvTranspose2d(8, 4, 1))
    found = converted(model, X, columns={"2": [0]})
    first, second = fxdbsr.report(found, X.double()).rows
    assert (first.macs_dense, first.params_dense, first.blocks_total, first.sparsity) == (128, 40, 2, 0.5)
    assert (second.macs_dense, second.params_dense, second.blocks_total, second.sparsity) == (128, 36, 2, 0.5)
    assert (first.macs, first.params, first.blocks_kept) == (64, 20, 1)
    assert (second.macs, second.params, second.blocks_kept) == (64, 20, 1)


ZOO = [
    "resnet18",
    "mobilenet_v3_small",
    "densenet121",
    "googlenet",
    "shufflenet_v2_x0_5",
    "efficientnet_b0",
    "regnet_x_400mf",
]


@torch.no_grad()
@pytest.mark.parametrize("structure", ["random", "rows", "columns", "zero"])
@pytest.mark.parametrize("name", ZOO)
def test_torchvision_models_stay_equal(name: str, structure: str) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    prepared = fxdbsr.prepare(build(name), 32)
    for layer in blocked_layers(prepared):
        mask = torch.rand(layer.mask.shape, generator=generator) > 0.4
        rows, columns = mask[:, :1].clone(), mask[:1].clone()
        masks = {"random": mask, "rows": rows, "columns": columns, "zero": torch.zeros_like(mask)}
        new = masks[structure].expand_as(mask).clone()
        new[0, 0] |= structure != "zero"
        layer.set_mask(new)
        layer.scale.uniform_(0.8, 1.6, generator=generator)
    enliven(prepared, x, generator)
    prepared.eval()
    found = fxdbsr.convert(prepared, backend="reference")
    expected = first_tensor(prepared(x))
    exact = first_tensor(copy.deepcopy(prepared).double()(x.double()))
    largest = exact.abs().max()
    eager = float((expected - exact).abs().max() / largest)
    assert float((first_tensor(found(x)) - expected).abs().max() / largest) <= max(BOUND, 8 * eager)
    graph = prepared.graph_module(False) if isinstance(prepared, TwoGraphModule) else prepared
    kept = sum(m.col_indices.numel() for m in found.modules() if isinstance(m, PackedConv))
    assert kept <= sum(int(layer.alive().sum()) for layer in blocked_layers(graph))
    if structure in ("columns", "zero"):
        return
    double = fxdbsr.convert(copy.deepcopy(prepared).double(), backend="reference", inplace=True)
    assert float((first_tensor(double(x.double())) - exact).abs().max() / largest) <= 1e-9
