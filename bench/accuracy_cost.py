"""What a net of bench/accuracy.py hits, and what it costs: accuracy, MACs, parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxdbsr
from bench.accuracy_nets import STEM
from bench.accuracy_setting import Setting, load
from fxdbsr.layers import BlockedLayer, blocked_layers
from fxdbsr.nn.scaled import Blocked
from fxdbsr.reporting.rows import LayerRow
from fxdbsr.scales import evaluation


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
