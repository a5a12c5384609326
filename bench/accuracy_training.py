"""What every arm of bench/accuracy.py shares: the setting of a run, the data, the nets, one loop, one count.

A run is a `Setting`. All arms train with SGD (Nesterov, momentum 0.9) in bfloat16 autocast over float32 weights, with
a linear warm-up of 5 % and a cosine to 0, in batches shifted by up to 2 pixels, for the same number of epochs in all.
Order of the batches and initial weights depend on the seed alone, so arms of one seed are pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxdbsr
from fxdbsr.digits import load_digits
from fxdbsr.generated import load_generated
from fxdbsr.images import ImageSet
from fxdbsr.layers import BlockedLayer, blocked_layers
from fxdbsr.models import BasicBlock
from fxdbsr.nn.scaled import Blocked
from fxdbsr.reporting.rows import LayerRow
from fxdbsr.scales import evaluation

STEM = "conv1"
MOMENTUM = 0.9
SHIFT = 2
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        arm: a key of `bench.accuracy_arms.ARMS`.
        seed: of the initial weights and the order of batches.
        sparsity: fraction of the blocked convs' MACs that shall be zero; None for arms that take gamma, or none.
        gamma: strength of the penalty.
        data: "generated" or "digits"; `draw` is the seed of the generated images: 0 to report, others to tune.
        net: "resnet" or "vgg"; `width` channels in its first stage, `depth` blocks a stage.
        block: (out, in) channels of a block.
        begin, end: fractions of the steps between which blocks go; one-shot pruning takes `end` alone.
        power: the score of a block is divided by this power of the MACs of one of its weights.
        options: of leads (`bench/accuracy_leads.py`), as sorted pairs.
    """

    arm: str
    seed: int
    sparsity: float | None = None
    gamma: float | None = None
    data: str = "generated"
    draw: int = 0
    net: str = "resnet"
    width: int = 32
    depth: int = 1
    block: tuple[int, int] = (4, 4)
    epochs: int = 12
    batch: int = 128
    lr: float = 0.4
    weight_decay: float = 1e-3
    begin: float = 0.1
    end: float = 0.67
    power: float = 0.5
    options: tuple[tuple[str, Any], ...] = ()

    def option(self, name: str, default: Any) -> Any:
        """An option of a lead, or its default."""
        return dict(self.options).get(name, default)


@lru_cache(maxsize=2)
def load(data: str, draw: int = 0) -> ImageSet:
    """The images on the device: 8,000 generated ones of 24 classes to train on and 10,000 to test, or the digits."""
    if data == "digits":
        found: Any = load_digits()
    else:
        found = load_generated(8000, 10000, size=24, difficulty=0.4, shapes=6, textures=4, seed=draw)
    parts = found.train_images, found.train_labels, found.test_images, found.test_labels
    return ImageSet(*(part.to(DEVICE) for part in parts))


class ResNet(nn.Module):
    """A 5x5 stem of stride 2, stages of `depth` blocks of 3x3 convs, a mean, one linear layer.

    Args:
        in_channels: of the images.
        classes: number of logits.
        widths: channels of the stages; every stage but the first halves the image.
        depth: residual blocks a stage.
    """

    def __init__(self, in_channels: int, classes: int, widths: tuple[int, ...], depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 5, 2, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        blocks: list[nn.Module] = []
        channels = widths[0]
        for stage, width in enumerate(widths):
            for number in range(depth):
                blocks.append(BasicBlock(channels, width, 2 if stage and not number else 1))
                channels = width
        self.body = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in_channels, H, W]` to `[N, classes]`."""
        x = F.relu(self.bn1(self.conv1(x)))
        logits: Tensor = self.fc(self.body(x).mean((2, 3)))
        return logits


class VGG(nn.Module):
    """A 5x5 stem of stride 2, then 3x3 convs without shortcuts; `depth` of them a stage, else as `ResNet`."""

    def __init__(self, in_channels: int, classes: int, widths: tuple[int, ...], depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 5, 2, 2, bias=False)
        layers: list[nn.Module] = [nn.BatchNorm2d(widths[0]), nn.ReLU()]
        channels = widths[0]
        for stage, width in enumerate(widths):
            layers += [nn.MaxPool2d(2)] if stage else []
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        self.body = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in_channels, H, W]` to `[N, classes]`."""
        logits: Tensor = self.fc(self.body(self.conv1(x)).mean((2, 3)))
        return logits


def make_net(setting: Setting, factor: float = 1.0) -> nn.Module:
    """The dense net of `setting`, its initial weights by the seed; every width times `factor`."""
    torch.manual_seed(setting.seed)
    kind = {"resnet": ResNet, "vgg": VGG}[setting.net]
    in_channels, classes = (1, 10) if setting.data == "digits" else (3, 24)
    widths = tuple(max(1, round(factor * setting.width * 2**stage)) for stage in range(3))
    net = kind(in_channels, classes, widths, setting.depth)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    moved: nn.Module = net.to(DEVICE).to(memory_format=torch.channels_last)
    return moved


def make_prepared(setting: Setting, form: str = "product", net: nn.Module | None = None) -> nn.Module:
    """The net of `setting`, or `net`, with block scales on every conv but the stem."""
    config = fxdbsr.BlockConfig(setting.block, by_name={STEM: None}, form=form)  # type: ignore[arg-type]
    return fxdbsr.prepare(make_net(setting) if net is None else net, config=config)


def scale_energies(model: nn.Module) -> list[tuple[nn.Parameter, float]]:
    """Every scale with the mean of its blocks' squared norms.

    A step of SGD on a scale moves its block along itself by this much more than the step on the weights does, where
    the scale is 1: large blocks would be decided before their weights have learned anything.
    """
    return [
        (layer.scale, float(layer.grid.block_sum(layer.weight.detach().square()).mean()))
        for layer in blocked_layers(model)
    ]


def without_scales(model: nn.Module) -> nn.Module:
    """`model` with its scales frozen at 1."""
    for scale in fxdbsr.block_scales(model).values():
        scale.requires_grad_(False)
    return model


def learning_rate(part: float, warmup: float = 0.05) -> float:
    """Factor on the learning rate after `part` of the steps: linear to 1, then a cosine to 0."""
    return part / warmup if part < warmup else 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * part))))


class Training:
    """One cycle of the learning rate over `epochs`, run in pieces; the model may be replaced between them.

    Args:
        model: a net, prepared or not.
        setting: learning rate, weight decay, batch, seed and data.
        epochs: of this cycle; those of the setting by default.
        loss: (logits, labels, images) to a loss; cross entropy by default.
    """

    def __init__(
        self,
        model: nn.Module,
        setting: Setting,
        epochs: int | None = None,
        loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.setting, self.data = setting, load(setting.data, setting.draw)
        self.steps_per_epoch = len(self.data.train_labels) // setting.batch
        self.steps = self.steps_per_epoch * (setting.epochs if epochs is None else epochs)
        self.step = 0
        self.loss = loss or (lambda logits, labels, images: F.cross_entropy(logits, labels))
        self._generator = torch.Generator().manual_seed(setting.seed)
        self._order: list[Tensor] = []
        self.replace(model)

    def replace(self, model: nn.Module) -> None:
        """Go on with `model`, and an optimizer without momentum yet."""
        self.model = model
        groups = fxdbsr.param_groups(model, self.setting.weight_decay)
        lr_of_scales = self.setting.option("scale_lr", 1.0)
        for number, group in enumerate(groups):
            group["factor"] = lr_of_scales if number == 2 else 1.0
        if len(groups) > 2:
            groups[2]["weight_decay"] = self.setting.option("scale_decay", 0.0)
        if rate := self.setting.option("scale_rate", 0.0):
            groups[2:] = [groups[2] | {"params": [s], "factor": rate / e} for s, e in scale_energies(model)]
        self.optimizer = torch.optim.SGD(groups, lr=self.setting.lr, momentum=MOMENTUM, nesterov=True, fused=True)

    def run(self, until: float = 1.0, after_step: Callable[[int], None] | None = None) -> nn.Module:
        """Train to the fraction `until` of the steps; `after_step` is called with the number of steps done."""
        self.model.train()
        while self.step < round(until * self.steps):
            self._take_step()
            self.step += 1
            if after_step is not None:
                after_step(self.step)
        return self.model

    def _take_step(self) -> None:
        images, labels = self._batch()
        for group in self.optimizer.param_groups:
            group["lr"] = self.setting.lr * group["factor"] * learning_rate((self.step + 1) / self.steps)
        self.optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = self.model(images)
        torch.autograd.backward(self.loss(logits.float(), labels, images))
        self.optimizer.step()

    def _batch(self) -> tuple[Tensor, Tensor]:
        if not self._order:
            order = torch.randperm(len(self.data.train_labels), generator=self._generator)
            self._order = list(order.split(self.setting.batch))[: self.steps_per_epoch]
        chosen = self._order.pop(0).to(DEVICE)
        shift = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=self._generator).tolist()
        images = torch.roll(self.data.train_images[chosen], shift, (2, 3))
        return images.contiguous(memory_format=torch.channels_last), self.data.train_labels[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, setting: Setting) -> float:
    """Percent of the test images that are hit, in float32."""
    data = load(setting.data, setting.draw)
    model.eval()
    hits = sum(
        int((model(images).argmax(1) == labels).sum())
        for images, labels in zip(data.test_images.split(500), data.test_labels.split(500), strict=True)
    )
    return 100 * hits / len(data.test_labels)


def conv_macs(model: nn.Module, setting: Setting) -> int:
    """MACs of one image in all convs but the stem, every weight counted; quicker than a report."""
    counted: list[int] = []

    def count(conv: Any, _: Any, y: Tensor) -> None:
        counted.append(conv.weight.numel() * y.shape[2] * y.shape[3])

    convs = [m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and name != STEM]
    hooks = [conv.register_forward_hook(count) for conv in convs]
    with evaluation(model), torch.no_grad():
        model(load(setting.data, setting.draw).test_images[:1])
    for hook in hooks:
        hook.remove()
    return sum(counted)


def cost(model: nn.Module, setting: Setting) -> dict[str, int]:
    """What `model` costs for one image, by `fxdbsr.report`.

    `macs` and `params`: of what masks and scales leave of all convs but the stem; `macs_dense`: of all their
    weights; `macs_needed`: of what is still needed once dead channels are gone. `macs_net` and `params_net`: of the
    whole net without dead channels, with stem, classifier and norms.
    """
    example = load(setting.data, setting.draw).test_images[:1]
    convs = _convs(fxdbsr.report(model, example))
    kept = {layer.name: layer for layer in blocked_layers(model)} if _is_prepared(model) else {}
    report = fxdbsr.report(fxdbsr.convert(model, backend="reference") if kept else model, example)
    weights = {row.name: _weights(kept.get(row.name), row.params_dense) for row in convs}
    positions = {row.name: row.macs_dense // row.params_dense for row in convs}
    return {
        "macs_dense": sum(row.macs_dense for row in convs),
        "macs": sum(weights[name] * positions[name] for name in weights),
        "macs_needed": sum(row.macs for row in _convs(report)),
        "macs_net": int(report.total.macs),
        "params": sum(weights.values()),
        "params_net": int(report.total.params),
    }


def _convs(report: fxdbsr.Report) -> list[LayerRow]:
    return [row for row in report.rows if row.kind == "conv2d" and row.name != STEM]


def _is_prepared(model: nn.Module) -> bool:
    return any(isinstance(module, Blocked) for module in model.modules())


def _weights(layer: BlockedLayer | None, dense: int) -> int:
    return dense if layer is None else int(layer.grid.numel()[layer.alive().cpu()].sum())
