"""Max pools of converted models: `fxdbsr.nn.pool.MaxPool2d`, which computes as torch's and can go back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import fxdbsr
from fxdbsr.kernels.pool import max_pool2d
from fxdbsr.nn.pool import MaxPool2d
from fxdbsr.passes import CONVERT
from fxdbsr.passes.name_pools import name_pools


class Net(nn.Module):
    """Two convs with a max pool between them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.pool = nn.MaxPool2d(*args, **options)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, 3, H, W]` to `[N, 8, P, Q]`."""
        x = self.pool(torch.relu(self.first(x)))
        y: Tensor = self.second(x[0] if self.pool.return_indices else x)
        return y


def prepared(*args: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return fxdbsr.prepare(Net(*args, **options), 8).eval()


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def pool_of(model: nn.Module) -> nn.Module:
    (found,) = (module for module in model.modules() if isinstance(module, nn.MaxPool2d))
    return found


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 9, 11)


@pytest.mark.parametrize("options", [{"kernel_size": 2}, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
                                     {"kernel_size": 3, "stride": 1, "dilation": 2}], ids=str)  # fmt: skip
def test_a_pool_becomes_ours_and_computes_the_same(options: dict[str, Any], x: Tensor) -> None:
    model = prepared(**options)
    converted = fxdbsr.convert(model)
    assert type(pool_of(converted)) is MaxPool2d
    assert type(pool_of(model)) is nn.MaxPool2d
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x))


@pytest.mark.parametrize("options", [{"return_indices": True}, {"ceil_mode": True}], ids=str)
def test_pools_that_give_indices_or_round_up_stay(options: dict[str, Any], x: Tensor) -> None:
    model = prepared(2, **options)
    converted = fxdbsr.convert(model)
    assert type(pool_of(converted)) is nn.MaxPool2d
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x))


class Loud(nn.MaxPool2d):
    """Somebody's own pool."""

    def forward(self, input: Tensor) -> Tensor:
        """Twice the largest."""
        y: Tensor = super().forward(input)
        return 2 * y


def test_a_pool_of_somebody_elses_class_keeps_its_forward(x: Tensor) -> None:
    net = Net(2)
    net.pool = Loud(2)
    model = fxdbsr.prepare(net, 8).eval()
    converted = fxdbsr.convert(model)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x))
        torch.testing.assert_close(model(x), net(x))


def test_hooks_of_a_pool_run_once(x: Tensor) -> None:
    model = prepared(2)
    pool_of(model).register_forward_hook(double)
    converted = fxdbsr.convert(model)
    assert type(pool_of(converted)) is MaxPool2d
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(converted(x), expected)
        pool_of(converted)._forward_hooks.clear()
        assert (converted(x) - expected).abs().max() > 0.1


def saved(model: nn.Module, x: Tensor, folder: Path) -> Any:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def exported(model: nn.Module, x: Tensor, folder: Path) -> Any:
    shapes = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=shapes), folder / "model.pt2")
    return torch.export.load(folder / "model.pt2").module()


def copied(model: nn.Module, x: Tensor, folder: Path) -> Any:
    return copy.deepcopy(model)


@pytest.mark.parametrize("way", [saved, exported, copied], ids=lambda way: way.__name__)
def test_a_converted_pool_travels(way: Any, x: Tensor, tmp_path: Path) -> None:
    model = prepared(3, 2, 1)
    converted = fxdbsr.convert(model, backend="reference")
    again = way(converted, x, tmp_path)
    if way is not exported:
        assert type(pool_of(again)) is MaxPool2d
    with torch.no_grad():
        for size in ((2, 3, 9, 11), (3, 3, 14, 8)):
            y = torch.randn(size)
            torch.testing.assert_close(again(y), model(y))


def test_to_dense_gives_torchs_pool_back(x: Tensor) -> None:
    model = prepared(3, 2, 1)
    dense = fxdbsr.to_dense(fxdbsr.convert(model))
    assert type(pool_of(dense)) is nn.MaxPool2d
    with torch.no_grad():
        torch.testing.assert_close(dense(x), model(x))


def test_gradients_pass_through() -> None:
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    MaxPool2d(2)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.sum() == 2 * 8 * 9


def test_one_image_without_a_batch_is_pooled() -> None:
    x = torch.randn(8, 6, 6)
    torch.testing.assert_close(max_pool2d(x, (2, 2), (2, 2), (0, 0), (1, 1)), nn.MaxPool2d(2)(x))
    torch.testing.assert_close(MaxPool2d(2)(x), nn.MaxPool2d(2)(x))


def test_a_state_loads_into_the_dense_model_with_our_pool(x: Tensor, tmp_path: Path) -> None:
    converted = fxdbsr.convert(prepared(3, 2, 1), backend="reference")
    torch.save(converted.state_dict(), tmp_path / "state.pt")
    dense = Net(3, 2, 1)
    loaded = fxdbsr.load(dense, tmp_path / "state.pt")
    assert (type(pool_of(loaded)), type(pool_of(dense))) == (MaxPool2d, nn.MaxPool2d)
    with torch.no_grad():
        assert torch.equal(loaded(x), converted(x))


def test_torch_fx_traces_a_pool(x: Tensor) -> None:
    traced = torch.fx.symbolic_trace(MaxPool2d(3, 2, 1))
    torch.testing.assert_close(traced(x), nn.MaxPool2d(3, 2, 1)(x))


class Called(Net):
    """The same with a function for the pool; a module of the model has the name that a graph gives its call."""

    def __init__(self, pool: Any) -> None:
        super().__init__(2)
        self.function, self.max_pool2d = pool, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """As `Net`."""
        y: Tensor = self.second(self.max_pool2d(self.function(torch.relu(self.first(x)))))
        return y


@pytest.mark.parametrize(
    ("pool", "kind"),
    [
        (lambda x: F.max_pool2d(x, 2), MaxPool2d),
        (lambda x: F.max_pool2d(input=x, kernel_size=(3, 2), stride=2, padding=1), MaxPool2d),
        (lambda x: F.max_pool2d(x, 3, 1, 1, 1, False, False), MaxPool2d),
        (lambda x: torch.max_pool2d(x, 2, stride=[]), MaxPool2d),
        (lambda x: F.max_pool2d(x, 2, ceil_mode=True), nn.MaxPool2d),
        (lambda x: F.avg_pool2d(x, 3, 2, 1, False, False), nn.AvgPool2d),
    ],
    ids=["max", "by name", "by place", "torch", "up", "mean"],
)
def test_pools_called_as_functions_become_modules(pool: Any, kind: type[nn.Module], x: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = fxdbsr.prepare(Called(pool), 8).eval()
    converted = fxdbsr.convert(model)
    (found,) = (module for module in converted.modules() if isinstance(module, nn.MaxPool2d | nn.AvgPool2d))
    assert type(found) is kind
    fxdbsr.save(converted, tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x))
        torch.testing.assert_close(fxdbsr.load(Called(pool), tmp_path / "model.safetensors")(x), model(x))
        torch.testing.assert_close(fxdbsr.to_dense(converted)(x), model(x))


@pytest.mark.parametrize(
    "pool",
    [lambda x: F.max_pool2d(x, 2, return_indices=True)[0], lambda x: F.max_pool2d(x, x.shape[2])],
    ids=["indices", "size of the image"],
)
def test_pools_that_no_module_is_like_stay_functions(pool: Any, x: Tensor) -> None:
    model = fxdbsr.prepare(Called(pool), 8).eval()
    converted = fxdbsr.convert(model)
    assert not any(isinstance(module, nn.MaxPool2d) for module in converted.modules())
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x))


def test_a_model_saved_before_pools_were_named_is_loaded(
    x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fxdbsr.prepare(Called(lambda x: F.max_pool2d(x, 2)), 8).eval()
    monkeypatch.setattr("fxdbsr.api.CONVERT", tuple(one for one in CONVERT if one is not name_pools))
    converted = fxdbsr.convert(model)
    assert isinstance(converted, torch.fx.GraphModule)
    assert any(node.target is F.max_pool2d for node in converted.graph.nodes)
    fxdbsr.save(converted, tmp_path / "model.safetensors")
    with torch.no_grad():
        loaded = fxdbsr.load(Called(lambda x: F.max_pool2d(x, 2)), tmp_path / "model.safetensors")
        torch.testing.assert_close(loaded(x), model(x))
