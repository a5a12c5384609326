"""The small nets of bench/accuracy.py: a stem, three stages of 3x3 convs, a mean, one linear layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxdbsr
from bench.accuracy_setting import CLASSES, DEVICE, Setting
from fxdbsr.models import BasicBlock

STEM = "conv1"


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
    in_channels, classes = 1 if setting.data == "digits" else 3, CLASSES[setting.data]
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


def without_scales(model: nn.Module) -> nn.Module:
    """`model` with its scales frozen at 1."""
    for scale in fxdbsr.block_scales(model).values():
        scale.requires_grad_(False)
    return model
