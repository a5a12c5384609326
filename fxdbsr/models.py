"""The two small nets of the method's authors, for images of 32x32: ResNet-20 and VGG11 with batch norm."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convs and a shortcut: a 1x1 projection where size or width changes, else the input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` to `[N, O, H / stride, W / stride]`."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet20(nn.Module):
    """A 3x3 stem, three stages of three blocks with 16, 32 and 64 channels, a mean, one linear layer."""

    def __init__(self, classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = _stage(16, 16, 1), _stage(16, 32, 2), _stage(32, 64, 2)
        self.fc = nn.Linear(64, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in_channels, H, W]` to `[N, classes]`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride),
        BasicBlock(out_channels, out_channels, 1),
        BasicBlock(out_channels, out_channels, 1),
    )


def resnet20(classes: int = 10, in_channels: int = 3) -> ResNet20:
    """ResNet-20 with projection shortcuts.

    For 100 classes and RGB at 32x32: 278,324 parameters, 40.82 M MACs.

    >>> sum(p.numel() for p in resnet20(100).parameters())
    278324
    """
    return ResNet20(classes, in_channels)


def vgg11_cifar(classes: int = 10) -> nn.Sequential:
    """VGG11 with batch norm: eight 3x3 convs, five poolings and one linear layer, for RGB at 32x32.

    For 100 classes: 9,277,284 parameters, 152.8 M MACs.

    >>> sum(p.numel() for p in vgg11_cifar(100).parameters())
    9277284
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels, stage = 3, 1
    for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        if width == 0:
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
            stage += 1
            continue
        name = sum(key.startswith("conv") for key in layers) + 1
        layers[f"conv{name}"] = nn.Conv2d(channels, width, 3, padding=1)
        layers[f"bn{name}"], layers[f"relu{name}"] = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        channels = width
    layers["flatten"], layers["fc"] = nn.Flatten(), nn.Linear(512, classes)
    model = nn.Sequential(layers)
    _initialise(model)
    return model


def _initialise(model: nn.Module) -> None:
    """Kaiming-normal conv weights, as torchvision's ResNets have."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
