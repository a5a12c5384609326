"""Channel pruning by Torch-Pruning (Fang et al., DepGraph, CVPR 2023) for bench/accuracy.py.

Its pruner removes whole groups of coupled channels; we let it take small steps until the convs have the MACs asked
for. It makes new parameters, so the optimizer starts anew after each round, without momentum.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from bench.accuracy_cost import conv_macs
from bench.accuracy_nets import make_net
from bench.accuracy_setting import Setting, load
from bench.accuracy_training import Training

ROUNDS = 10
STEPS = 400


def channels(setting: Setting) -> nn.Module:
    """In ten rounds between `begin` and `end`, along the cubic schedule of the other arms."""
    return _pruned(setting, ROUNDS)


def channels_once(setting: Setting) -> nn.Module:
    """In one round at `end`."""
    return _pruned(setting, 1)


def _pruned(setting: Setting, rounds: int) -> nn.Module:
    assert setting.sparsity is not None
    model = make_net(setting)
    whole = conv_macs(model, setting)
    training = Training(model, setting)
    for number in range(1, rounds + 1):
        training.run(setting.begin + (setting.end - setting.begin) * number / rounds)
        sparsity = setting.sparsity * (1 - (1 - number / rounds) ** 3)
        shrink_(model, setting, (1 - sparsity) * whole)
        training.replace(model)
    return training.run()


def shrink_(model: nn.Module, setting: Setting, macs: float) -> None:
    """Remove channels in place until the convs have at most `macs`, by group magnitude over all layers."""
    if conv_macs(model, setting) <= macs:
        return
    pruner = make_pruner(model, setting)
    for _ in range(STEPS):
        pruner.step()
        if conv_macs(model, setting) <= macs:
            return
    raise ValueError(f"Torch-Pruning stops above {macs} MACs")


def make_pruner(model: nn.Module, setting: Setting) -> Any:
    """Torch-Pruning's pruner in small steps; options "importance" and "scope" pick its kind."""
    import torch_pruning as tp

    importance = {
        "magnitude": tp.importance.GroupMagnitudeImportance,
        "bn": tp.importance.BNScaleImportance,
    }[setting.option("importance", "magnitude")]()
    return tp.pruner.BasePruner(
        model,
        load(setting.data, setting.draw).test_images[:1],
        importance=importance,
        global_pruning=setting.option("scope", "global") == "global",
        isomorphic=setting.option("scope", "global") == "isomorphic",
        pruning_ratio=1.0,
        max_pruning_ratio=0.95,
        iterative_steps=STEPS,
        ignored_layers=[model.fc],
    )
