"""The arms of bench/accuracy.py: each trains one net for the setting's epochs and returns it.

* dense, slim: the dense net; a narrower one that has the MACs asked for from the start.
* scaled: fxdbsr's default, trainable block scales on a gradual schedule.
* gradual, gradual_layer: block-magnitude pruning on the same schedule, over all layers together or in each alone.
* once, once_layer: the same in one shot at `end`, then fine-tuning.
* clamp: the form of the method's authors, `clamp(S, 0, 1)` with a straight-through gradient, and the penalty in the
  loss; blocks with S <= 0 are cut for good at `end`. proximal: the penalty as a proximal step, likewise.
* channels, channels_once: Torch-Pruning's magnitude pruner over groups of channels, in ten rounds or in one.
* lead: scaled with the options of `bench/accuracy_leads.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

import fxdbsr
from bench.accuracy_channels import channels, channels_once
from bench.accuracy_cost import conv_macs
from bench.accuracy_leads import lead
from bench.accuracy_nets import make_net, make_prepared, without_scales
from bench.accuracy_schedule import BlockSchedule
from bench.accuracy_setting import Setting
from bench.accuracy_training import Training
from fxdbsr.layers import blocked_layers


def dense(setting: Setting) -> nn.Module:
    """The whole net."""
    return Training(make_net(setting), setting).run()


def slim(setting: Setting) -> nn.Module:
    """A dense net whose widths are scaled by one factor, so that its convs have the MACs nearest to those asked for."""
    assert setting.sparsity is not None
    whole = conv_macs(make_net(setting), setting)
    wanted = (1 - setting.sparsity) * whole
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if conv_macs(make_net(setting, middle), setting) < wanted else (low, middle)
    nearest = min((low, high), key=lambda factor: abs(conv_macs(make_net(setting, factor), setting) - wanted))
    return Training(make_net(setting, nearest), setting).run()


def scaled(setting: Setting) -> nn.Module:
    """fxdbsr's default."""
    return _scheduled(setting, make_prepared(setting), "global")


def gradual(setting: Setting) -> nn.Module:
    """No scales: block-magnitude pruning over all layers."""
    return _scheduled(setting, without_scales(make_prepared(setting)), "global")


def gradual_layer(setting: Setting) -> nn.Module:
    """No scales: the same fraction of every layer."""
    return _scheduled(setting, without_scales(make_prepared(setting)), "layer")


def _scheduled(setting: Setting, model: nn.Module, scope: str) -> nn.Module:
    training = Training(model, setting)
    training.hold_scales()
    return training.run(after_step=BlockSchedule(model, setting, training.steps, scope))


def clamp(setting: Setting) -> nn.Module:
    """The authors' form; gamma sets the sparsity."""
    gamma = _gamma(setting)
    model = make_prepared(setting, form="clamp")

    def loss(logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels) + gamma * fxdbsr.penalty(model)

    training = Training(model, setting, loss=loss)
    training.run(setting.end)
    for layer in blocked_layers(model):
        layer.set_mask(layer.alive())
    return training.run()


def proximal(setting: Setting) -> nn.Module:
    """The penalty as a proximal step; gamma sets the sparsity."""
    model = make_prepared(setting)
    training = Training(model, setting)
    sparsifier = fxdbsr.Sparsifier(model, training.optimizer, gamma=_gamma(setting))
    training.run(setting.end)
    sparsifier.finalize()
    return training.run()


def once(setting: Setting) -> nn.Module:
    """One-shot pruning over all layers."""
    return gradual(_one_shot(setting))


def once_layer(setting: Setting) -> nn.Module:
    """One-shot pruning in each layer."""
    return gradual_layer(_one_shot(setting))


def _one_shot(setting: Setting) -> Setting:
    return replace(setting, begin=setting.end)


def _gamma(setting: Setting) -> float:
    if setting.gamma is None:
        raise ValueError(f"gamma: required by the arm {setting.arm}")
    return setting.gamma


ARMS: dict[str, Callable[[Setting], nn.Module]] = {
    arm.__name__: arm
    for arm in (
        dense, slim, scaled, gradual, gradual_layer, once, once_layer, clamp, proximal, channels, channels_once,
        lead,
    )
}  # fmt: skip
