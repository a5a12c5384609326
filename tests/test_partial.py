"""Models that do not trace whole: the largest parts that do are prepared and converted, the rest says why not."""

import copy
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

import fxdbsr
from bench.coverage import enliven
from fxdbsr.layers import blocked_layers
from fxdbsr.nn.packed import PackedConv
from fxdbsr.nn.scaled import ScaledLayer
from fxdbsr.partial import parts_of
from fxdbsr.traced import TwoGraphModule


def block(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = block(3, 8), block(8, 8)
        self.drop = nn.Dropout(0.0)
        self.levels = 2

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        if self.training:
            x = self.drop(x)
        return {"fine": self.branch(x) + x, "coarse": F.max_pool2d(x, 2)}


class Detector(nn.Module):
    """A loop over values, control flow on them, and a head that is called once a level."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head, self.score = Backbone(), block(8, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = list(self.backbone(x).values())[: self.backbone.levels]
        found = []
        for level in levels:
            y = self.head(level)
            if y.max() > 0:
                y = self.score(y)
            found.append(y)
        return found


X = torch.randn(2, 3, 8, 8)


def pruned(model: nn.Module, block_size: Any = 4) -> nn.Module:
    torch.manual_seed(0)
    prepared = fxdbsr.prepare(model, block_size)
    enliven(prepared, X, torch.Generator().manual_seed(0))
    fxdbsr.block_prune_(prepared, 0.4, score="random", generator=torch.Generator().manual_seed(0))
    return prepared.eval()


def untraced(model: Any) -> dict[str, str]:
    found: dict[str, str] = model.untraced
    return found


def assert_same(found: nn.Module, expected: nn.Module, x: Tensor = X) -> None:
    with torch.no_grad():
        torch.testing.assert_close(found(x), expected(x), rtol=1e-4, atol=1e-5)


def test_parts_are_graphs_lone_layers_are_scaled_and_state_keeps_its_names() -> None:
    model = Detector()
    prepared = fxdbsr.prepare(model, 4)
    assert type(prepared) is Detector
    assert [type(part) is TwoGraphModule for part in parts_of(prepared).values()] == [True, False]
    assert list(parts_of(prepared)) == ["backbone", "head"]
    assert isinstance(prepared.score, ScaledLayer)
    new = set(prepared.state_dict()) - set(model.state_dict())
    assert set(model.state_dict()) <= set(prepared.state_dict())
    assert all(name.endswith((".scale", ".mask")) for name in new)
    for mode in (True, False):
        torch.testing.assert_close(prepared.train(mode)(X), model.train(mode)(X), rtol=0, atol=0)
    assert list(untraced(prepared)) == [""]
    assert "Detector cannot be traced" in untraced(prepared)[""]


def test_parts_and_lone_layers_are_lowered() -> None:
    prepared = pruned(Detector())
    converted = fxdbsr.convert(prepared, backend="reference")
    assert_same(converted, prepared)
    assert type(converted) is Detector
    packed = [name for name, m in converted.named_modules() if isinstance(m, PackedConv)]
    assert packed == ["backbone.stem.0", "backbone.branch.0", "head.0", "score"]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())
    assert isinstance(converted.get_submodule("head"), fx.GraphModule)
    for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert_same(other, converted)
    assert_same(fxdbsr.to_dense(converted), prepared)
    assert_same(fxdbsr.to_dense(prepared), prepared)


def test_an_ordinary_model_converts_in_parts() -> None:
    model = Detector().eval()
    assert_same(fxdbsr.convert(model, block_size=4, backend="reference"), model)


def test_tuning_measures_layers_of_parts_and_lone_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXDBSR_CACHE", str(tmp_path))
    prepared = pruned(Detector())
    converted = fxdbsr.convert(prepared, tune=True, example_inputs=X)
    assert_same(converted, prepared)
    layers = [m for m in converted.modules() if isinstance(m, PackedConv)]
    assert layers
    assert all(layer.reason.startswith("measured") for layer in layers)


def test_the_report_says_which_parts_are_left_and_why() -> None:
    prepared = pruned(Detector())
    for model in (prepared, fxdbsr.convert(prepared, backend="reference")):
        report = fxdbsr.report(model, X)
        assert [row.name for row in report.rows] == ["backbone.stem.0", "backbone.branch.0", "head.0", "score"]
        assert "Detector cannot be traced by torch.fx" in str(report)
        assert "Detector cannot be traced by torch.fx" in report.to_json()


def test_positions_are_those_of_all_calls_of_a_forward() -> None:
    prepared = fxdbsr.prepare(Detector(), 4)
    for _ in range(2):
        prepared(X)
    positions = {layer.name: [n for user in layer.users for n in user.positions] for layer in blocked_layers(prepared)}
    assert positions == {"backbone.stem.0": [64], "backbone.branch.0": [64], "head.0": [64, 16], "score": [64, 16]}
    optimizer = torch.optim.SGD(fxdbsr.param_groups(prepared, weight_decay=0.0), lr=0.01)
    sparsifier = fxdbsr.Sparsifier(prepared, optimizer, target=0.5, of="macs", steps=4)
    for _ in range(4):
        optimizer.zero_grad()
        torch.stack([level.square().mean() for level in prepared(X)]).sum().backward()
        optimizer.step()
    assert sparsifier.sparsity() > 0


class Around(nn.Module):
    """Uses its submodule `part` in a way of its own, and cannot be traced."""

    part: Any

    def __init__(self, part: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.part, self.other = part, other

    def run(self, x: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x) if x.sum() < float("inf") else x


class Iterates(Around):
    def run(self, x: Tensor) -> Any:
        for layer in self.part:
            x = layer(x)
        return x


class Indexes(Around):
    def run(self, x: Tensor) -> Any:
        return self.part(x) + self.part[0](x)


class ReachesIn(Around):
    def run(self, x: Tensor) -> Any:
        return self.part.stem(x)


class Passes(Around):
    def run(self, x: Tensor) -> Any:
        part = self.part
        return part(x)["fine"]


class ReadsWeight(Around):
    def run(self, x: Tensor) -> Any:
        return self.part(x) * self.part.weight.mean()


class AsksFor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = block(3, 8)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y: Tensor = self.inner(x) * scale
        return y


class GivesOption(Around):
    def run(self, x: Tensor) -> Any:
        return self.part(x, scale=2.0)


@pytest.mark.parametrize(
    ("kind", "part", "name", "why", "blocked"),
    [
        (Iterates, lambda: block(3, 8), "part", "uses it as a value", "part.0"),
        (Indexes, lambda: block(3, 8), "part", "uses it as a value", "part.0"),
        (ReachesIn, Backbone, "part", "uses its stem", "part.stem.0"),
        (Passes, Backbone, "part", "uses it as a value", "part.stem.0"),
        (ReadsWeight, lambda: nn.Conv2d(3, 8, 1), "part", "uses its weight", None),
        (GivesOption, AsksFor, "part", "takes optional arguments", "part.inner.0"),
    ],
)
def test_what_the_code_around_uses_stays_and_says_why(
    kind: Any, part: Any, name: str, why: str, blocked: str | None
) -> None:
    model = kind(part(), block(3, 8))
    prepared = pruned(model)
    assert why in untraced(prepared)[name]
    assert (blocked in [layer.name for layer in blocked_layers(prepared)]) == (blocked is not None)
    assert_same(fxdbsr.convert(prepared, backend="reference"), prepared)


class Tied(nn.Module):
    """Two convs of one weight, in a part and beside it; a submodule at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.Conv2d(3, 3, 1)
        self.b.weight = self.a.get_parameter("0.weight")
        self.c = block(3, 8)
        self.again = nn.ModuleList([self.c])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x) + self.b(x)
        z: Tensor = self.c(y) + self.again[0](x) if y.sum() < float("inf") else y
        return z


def test_tied_weights_share_a_scale_and_a_submodule_at_two_places_stays_one() -> None:
    prepared = pruned(Tied(), 1)
    assert prepared.get_submodule("c") is prepared.get_submodule("again.0")
    assert prepared.get_submodule("a.0").scale is prepared.get_submodule("b").scale
    assert "shares tensors" in untraced(prepared)["a"]
    converted = fxdbsr.convert(prepared, backend="reference")
    assert converted.get_submodule("c") is converted.get_submodule("again.0")
    assert_same(converted, prepared)


def test_arguments_for_the_whole_model_are_not_lost_where_only_parts_trace() -> None:
    with pytest.raises(ValueError, match="Detector cannot be traced"):
        fxdbsr.prepare(Detector(), concrete_args={"x": None})


def test_values_are_taken_for_tensors() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Any) -> Tensor:
            x = [x] if isinstance(x, Tensor) else x
            y: Tensor = self.conv(torch.cat(x, 1))
            return y if torch.is_tensor(y) else y * 2

    model = Asks()
    prepared = fxdbsr.prepare(model, 4)
    assert isinstance(prepared, fx.GraphModule)
    torch.testing.assert_close(prepared(X), model(X), rtol=0, atol=0)


class OfTheMoment(nn.Module):
    """Its forward depends on what is true when it runs: `how` says on what."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        if self.how == "torch.rand":
            y = self.a(x) if torch.rand(()) < 0.5 else 2 * self.a(x)
        elif self.how == "random.random":
            y = self.a(x) if random.random() < 0.5 else 2 * self.a(x)
        elif self.how == "no_grad":
            with torch.no_grad():
                y = self.a(x)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                y = self.a(x).float()
        z: Tensor = self.b(y)
        return z


@pytest.mark.parametrize("how", ["torch.rand", "random.random", "no_grad", "autocast"])
def test_what_is_true_for_the_moment_does_not_stay(how: str) -> None:
    model = OfTheMoment(how)
    before = torch.get_rng_state()
    prepared = fxdbsr.prepare(model, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(blocked_layers(prepared)) == 2
    for seed in range(8):
        outputs = []
        for module in (model, prepared):
            torch.manual_seed(seed)
            random.seed(seed)
            outputs.append(module(X))
        assert torch.equal(*outputs)
    outputs[1].sum().backward()
    weight = prepared.get_submodule("a").weight
    assert (weight.grad is None) == (how == "no_grad")


@torch.no_grad()
def test_sizes_are_not_taken_for_tensors() -> None:
    class Pads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            height = x.size(-2) / 3
            more = (height.ceil() if isinstance(height, Tensor) else height + 0.5) * 3 - x.shape[-2]
            y: Tensor = self.conv(x) * more
            return y

    model = Pads()
    torch.testing.assert_close(fxdbsr.prepare(model, 4)(X), model(X), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "raft_small"])
def test_detection_and_flow_models(name: str) -> None:
    torch.manual_seed(0)
    raft = name.startswith("raft")
    options = {} if raft else {"weights_backbone": None}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    prepared = fxdbsr.prepare(model)
    assert len(blocked_layers(prepared)) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    fxdbsr.block_prune_(prepared, 0.3)
    prepared.eval()
    converted = fxdbsr.convert(prepared, backend="dense")
    if raft:
        images = (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))
        expected, found = (model(*images, num_flow_updates=2)[-1] for model in (prepared, converted))
    else:
        expected, found = (torch.cat([d["boxes"] for d in m([torch.rand(3, 96, 96)])]) for m in (prepared, converted))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
