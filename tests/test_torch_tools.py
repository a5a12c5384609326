"""What other tools of torch and torchvision do with prepared and converted models: tracers, torch.func, any names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import fxdbsr
from bench.small_net import SmallNet, sparse

BACKENDS = ("auto", "reference", "dense")


class Functional(nn.Module):
    """A conv on a parameter of the model, a transposed conv and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.up, self.head = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.up(torch.nn.functional.conv2d(x, self.kernel)).mean((2, 3)))
        return y


def prepared() -> nn.Module:
    torch.manual_seed(0)
    return sparse(SmallNet(), torch.randn(2, 3, 12, 12), 8).eval()


@pytest.mark.parametrize(
    "make",
    [prepared, lambda: fxdbsr.prepare(Functional(), 4, types=[nn.Conv2d, nn.ConvTranspose2d, nn.Linear]).eval()],
    ids=["convs", "others"],
)
def test_torch_fx_traces_layers_as_calls(make: Callable[[], nn.Module]) -> None:
    model, x = make(), torch.randn(2, 3, 12, 12)
    for whole in (model, fxdbsr.convert(model)):
        traced = fx.symbolic_trace(whole)
        assert torch.equal(traced(x), fx.Interpreter(traced).run(x))
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
        assert [node for node in traced.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("converted", [False, True], ids=["prepared", "converted"])
def test_torchvision_extracts_features(converted: bool) -> None:
    torch.manual_seed(0)
    model = fxdbsr.prepare(resnet18(), 8).eval()
    x = torch.randn(1, 3, 64, 64)
    seen: dict[str, Tensor] = {}
    model.get_submodule("layer2.1.conv2").register_forward_hook(lambda module, args, y: seen.update(y=y))
    expected = model(x)
    source = fxdbsr.convert(model) if converted else model
    # conversion folds bn2 and the residual into conv2
    wanted = [name for name in get_graph_node_names(source)[1] if "fc" in name or "layer2.1.conv2" in name]
    found = list(create_feature_extractor(source, wanted).eval()(x).values())
    torch.testing.assert_close(found[-1], expected, rtol=1e-4, atol=1e-4)
    assert found[0].shape == seen["y"].shape


def test_gradients_of_each_sample() -> None:
    model, x = prepared(), torch.randn(4, 3, 12, 12)
    trained = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        y: Tensor = functional_call(model, parameters, (image[None],))
        return y.square().sum()

    each = vmap(grad(loss), (None, 0))(trained, x)
    for number, image in enumerate(x):
        model.zero_grad()
        model(image[None]).square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(each[name][number], p.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_over_images_is_a_batch(backend: str) -> None:
    fast, x = fxdbsr.convert(prepared(), backend=backend), torch.randn(3, 2, 3, 12, 12)
    expected = torch.stack([fast(images) for images in x])
    torch.testing.assert_close(vmap(fast)(x), expected, rtol=1e-4, atol=1e-5)
    along = vmap(fast, in_dims=2, out_dims=1)(x.movedim(0, 2))
    torch.testing.assert_close(along, expected.movedim(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_jacobians_of_converted_models(backend: str) -> None:
    fast, x = fxdbsr.convert(prepared(), backend=backend), torch.randn(1, 3, 12, 12)
    found = jacrev(fast)(x)
    y, pull, *_ = vjp(fast, x)
    (row,) = pull(torch.eye(y.numel())[1].view_as(y))
    torch.testing.assert_close(found.reshape(y.numel(), *x.shape)[1], row, rtol=1e-4, atol=1e-5)


class Named(nn.Module):
    """A conv in a container of any name, or there by itself, and one beside it."""

    def __init__(self, name: str, alone: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(8, 8, 3, padding=1)
        self.name, self.beside = name, nn.Conv2d(8, 8, 1)
        self.add_module(name, conv if alone else nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU()))

    def forward(self, x: Tensor) -> Any:
        return self.beside(self.get_submodule(self.name)(x))


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    "name", ["graph", "code", "meta", "_code", "_parts", "class", "of", "runner", "follow", "plain"]
)
def test_names_that_graph_modules_take_for_themselves(name: str, alone: bool) -> None:
    torch.manual_seed(0)
    model = Named(name, alone).eval()
    prepared = fxdbsr.prepare(model, 8)
    names = [name if alone else f"{name}.0", "beside"]
    assert sorted(fxdbsr.block_scales(prepared)) == sorted(names if name == "plain" or not alone else ["beside"])
    if name != "plain":
        untraced: Any = prepared.untraced
        reasons = " ".join(untraced.values())
        assert f"name {name!r} of their own" in reasons or "holds a word of Python's own" in reasons
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(prepared(x), model(x))
    torch.testing.assert_close(fxdbsr.convert(prepared)(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_name_that_leaves_nothing_is_said() -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Any:
            return self.graph(x)

    with pytest.raises(ValueError, match="name 'graph' of their own, which hides 'graph'"):
        fxdbsr.prepare(Only(), 8)


def test_a_name_that_no_step_calls_is_nobodys_business() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1))
    model.add_module("spare", nn.ModuleDict({"class": nn.Conv2d(8, 8, 1)}))
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    assert list(fxdbsr.block_scales(fxdbsr.prepare(model, 8, inplace=True))) == ["0"]
