"""Models that graph rewrites get wrong easily: what `convert` makes of them is right, or it says why it refuses."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxdbsr
from fxdbsr.layers import blocked_layers
from fxdbsr.passes.selection import CONV_TYPES

X = torch.randn(2, 4, 5, 5, dtype=torch.float64)


class Model(nn.Module):
    """Three convs and their norms, for the models below."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.n, self.m = nn.BatchNorm2d(8), nn.BatchNorm2d(8)


class ReadsItsOwnOutput(Model):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        for _ in range(3):
            y = F.relu(self.n(self.b(y)))
        return self.c(y)


class CallsInACircle(Model):
    def forward(self, x: Tensor) -> Any:
        return self.c(self.b(self.a(self.c(self.b(self.a(x))))))


class SharedStatistics(Model):
    def __init__(self) -> None:
        super().__init__()
        self.m.running_mean, self.m.running_var, self.m.weight = self.n.running_mean, self.n.running_var, self.n.weight

    def forward(self, x: Tensor) -> Any:
        return self.c(F.relu(self.m(self.b(F.relu(self.n(self.a(x)))))))


class SharedWeight(Model):
    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Conv2d(8, 8, 1)
        self.d.weight = self.b.weight

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.a(x))
        return self.c(F.relu(self.b(y)) + self.d(y[:, :8] * 2))


class SharedBias(Model):
    def __init__(self) -> None:
        super().__init__()
        self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Any:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


class OneBufferTwice(Model):
    def __init__(self) -> None:
        super().__init__()
        factor = torch.rand(8, 1, 1)
        self.register_buffer("factor", factor)
        self.register_buffer("again", factor)

    def forward(self, x: Tensor) -> Any:
        return self.c(self.b(self.a(x) * self.factor) * self.again)


class ReadsAWeight(Model):
    def forward(self, x: Tensor) -> Any:
        return self.c(F.relu(self.b(self.a(x)))) * self.b.weight.sum()


class WritesTheConvsOutput(Model):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        z = self.b(y)
        y.mul_(2)
        z.add_(y)
        return self.c(F.relu_(z)) + self.c(y)


class SetsAChannel(Model):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        y[:, 1] = 3.0
        return self.c(F.relu(self.b(y)))


class WritesThroughAView(Model):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        part = y[:, 2:6]
        part.fill_(1.0)
        return self.c(F.relu(self.b(y)))


class WritesThenReadsBefore(Model):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        flat = y.flatten(2)
        y += 1
        return self.c(self.b(F.relu(flat).view_as(y)))


class NormInTraining(Model):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.n.train()
        return self

    def forward(self, x: Tensor) -> Any:
        return self.c(F.relu(self.n(self.a(x))))


class NormWithoutStatistics(Model):
    def __init__(self) -> None:
        super().__init__()
        self.n = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Any:
        return self.c(F.relu(self.n(self.a(x))))


class NormFunctionInTraining(Model):
    def forward(self, x: Tensor) -> Any:
        return self.c(F.relu(F.batch_norm(self.a(x), None, None, training=True)))


class DropsInEvaluation(Model):
    def forward(self, x: Tensor) -> Any:
        return self.c(F.dropout(F.relu(self.a(x)), 0.5, training=True))


class Drops(Model):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.drop2d = nn.Dropout(), nn.Dropout2d()

    def forward(self, x: Tensor) -> Any:
        return self.c(self.drop2d(F.relu(self.b(self.drop(self.a(x))))))


class Branches(Model):
    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.a(x))
        return self.c(self.b(y)) if y.sum() > 0 else self.c(y)


class LoopsOverValues(Model):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        while y.abs().max() > 1:
            y = y / 2
        return self.c(F.relu(self.b(y)))


class ReadsAnInside(Model):
    """Its forward looks at a tensor of a module that it calls, too."""

    def forward(self, x: Tensor) -> Any:
        return self.c(F.relu(self.n(self.b(self.a(x)))) + self.n.bias.view(1, -1, 1, 1))


MODELS = [kind for kind in Model.__subclasses__() if kind is not DropsInEvaluation]


def pruned(model: nn.Module, structure: str) -> nn.Module:
    """`model` prepared, in float64, whole rows, columns or random blocks off."""
    generator = torch.Generator().manual_seed(0)
    prepared = fxdbsr.prepare(model.double(), 2, types=(*CONV_TYPES, nn.Linear))
    for layer in blocked_layers(prepared):
        mask = torch.rand(layer.mask.shape, generator=generator) > 0.4
        masks = {"random": mask, "rows": mask[:, :1], "columns": mask[:1], "zero": torch.zeros_like(mask)}
        layer.set_mask(masks[structure].expand_as(mask).clone())
    for norm in (m for m in prepared.modules() if isinstance(m, nn.BatchNorm2d)):
        for name, buffer in norm.named_buffers():
            if buffer.is_floating_point():
                buffer.uniform_(*((0.5, 2) if name == "running_var" else (-1, 1)), generator=generator)
        norm.weight.data.uniform_(0.5, 2, generator=generator)
    return prepared.eval()


@torch.no_grad()
@pytest.mark.parametrize("structure", ["random", "rows", "columns", "zero"])
@pytest.mark.parametrize("kind", MODELS)
def test_converts_rightly(kind: type[nn.Module], structure: str) -> None:
    torch.manual_seed(0)
    prepared = pruned(kind(), structure)
    converted = fxdbsr.convert(prepared, backend="reference")
    expected = prepared(X.clone())
    for _ in range(2):
        torch.testing.assert_close(converted(X.clone()), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("structure", ["rows", "columns", "zero"])
def test_what_drops_in_evaluation_still_drops(structure: str) -> None:
    torch.manual_seed(0)
    prepared = pruned(DropsInEvaluation(), structure)
    converted = fxdbsr.convert(prepared, backend="reference")
    many = X.repeat(3000, 1, 1, 1)
    expected, found = prepared(many), converted(many)
    torch.testing.assert_close(found.mean((0, 2, 3)), expected.mean((0, 2, 3)), rtol=0.02, atol=0.02)
    torch.testing.assert_close(found.std((0, 2, 3)), expected.std((0, 2, 3)), rtol=0.02, atol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("where", ["a", "n", "act", "c", ""])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_see_and_change_what_they_did(where: str, when: str) -> None:
    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(4, 8, 1), "n": nn.BatchNorm2d(8), "act": nn.ReLU(), "c": nn.Conv2d(8, 4, 1)}
    prepared = pruned(nn.Sequential(*layers.values()), "rows")
    module = prepared.get_submodule(str([*layers].index(where))) if where else prepared
    if when == "before":
        module.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    else:
        module.register_forward_hook(lambda _, args, y: y + 1)
    expected = prepared(X)
    torch.testing.assert_close(fxdbsr.convert(prepared, backend="reference")(X), expected, rtol=1e-10, atol=1e-10)
