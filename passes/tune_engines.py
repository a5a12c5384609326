"""packed conv on the engine of the rule -> packed conv on the engine that is fastest on the example inputs.

Runs last, when epilogues are fused. One forward records what each packed conv sees. Without `tune` the rule then
chooses anew, with the sizes known. With it, the engines that can run the conv, and torch's own, are checked against
the reference and timed in turn, and the lowest median wins; what was found before on such a conv is taken from the
cache (`fxdbsr.kernels.tuning`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxdbsr.nn.fastest import take_fastest
from fxdbsr.nn.packed import PackedConv
from fxdbsr.passes.lowering import Lowering


def tune_engines(model: nn.Module, lowering: Lowering) -> None:
    """Choose the engine of every packed conv by what it sees in a forward of the example inputs, where there are any.

    Raises:
        ValueError: the model's forward fails on the example inputs.
    """
    if not lowering.example_inputs:
        return
    for layer, arguments in seen_inputs(model, lowering.example_inputs).items():
        layer.size = layer.size_of(arguments[0])
        if lowering.tune:
            with torch.inference_mode():
                take_fastest(layer, arguments)
        elif lowering.backend == "auto":
            layer.choose_engine(residual=len(arguments) > 1)


def seen_inputs(model: nn.Module, inputs: tuple[Any, ...]) -> dict[PackedConv, tuple[Any, ...]]:
    """The arguments of the first call of each packed conv in a forward of `inputs`."""
    seen: dict[PackedConv, tuple[Any, ...]] = {}

    def note(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(layer, PackedConv)
        seen.setdefault(layer, arguments)

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, PackedConv)]
    try:
        with torch.inference_mode():
            model(*inputs)
    except Exception as error:
        raise ValueError(f"example_inputs: the model's forward fails on them: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return seen
