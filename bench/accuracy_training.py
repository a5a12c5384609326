"""The loop that all arms of bench/accuracy.py train in.

SGD (Nesterov, momentum 0.9) in bfloat16 autocast over float32 weights, with a linear warm-up of 5 % and a cosine to 0,
in batches shifted by up to 2 pixels. Order of the batches and initial weights depend on the seed alone, so arms of one
seed are pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxdbsr
from bench.accuracy_setting import DEVICE, Setting, load
from bench.accuracy_steps import change_gradients
from fxdbsr.layers import blocked_layers
from fxdbsr.still import StillScales

MOMENTUM = 0.9
SHIFT = 2


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
        self.step, self._held = 0, 0.0
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
        change_gradients(self.optimizer, model, self.setting)

    def hold_scales(self) -> None:
        """Let the scales stand still until the setting's `begin`."""
        self._still = StillScales(self.optimizer, blocked_layers(self.model))
        self._held = self.setting.begin * self.steps

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
        if held := self.step + 1 < self._held:
            self._still.note()
        self.optimizer.step()
        if held:
            self._still.undo()

    def _batch(self) -> tuple[Tensor, Tensor]:
        if not self._order:
            order = torch.randperm(len(self.data.train_labels), generator=self._generator)
            self._order = list(order.split(self.setting.batch))[: self.steps_per_epoch]
        chosen = self._order.pop(0).to(DEVICE)
        shift = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=self._generator).tolist()
        images = torch.roll(self.data.train_images[chosen], shift, (2, 3))
        return images.contiguous(memory_format=torch.channels_last), self.data.train_labels[chosen]


def learning_rate(part: float, warmup: float = 0.05) -> float:
    """Factor on the learning rate after `part` of the steps: linear to 1, then a cosine to 0."""
    return part / warmup if part < warmup else 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * part))))


def scale_energies(model: nn.Module) -> list[tuple[nn.Parameter, float]]:
    """Every scale with the mean of its blocks' squared norms.

    A step of SGD on a scale moves its block along itself by this much more than the step on the weights does, where
    the scale is 1: large blocks would be decided before their weights have learned anything.
    """
    return [
        (layer.scale, float(layer.grid.block_sum(layer.weight.detach().square()).mean()))
        for layer in blocked_layers(model)
    ]
