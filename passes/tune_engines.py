"""packed conv on the engine of the rule -> packed conv on the engine that is fastest on the example inputs.

Runs last. One forward records what each packed conv sees. The engines that can run the conv, and torch's own, are
checked against the reference and timed in turn, and the lowest median wins; what was found before on such a conv is
taken from the cache (`fxdbsr.kernels.tuning`).
"""

from __future__ import annotations

import torch
from torch import nn

from fxdbsr.nn.fastest import take_fastest
from fxdbsr.passes.lowering import Lowering
from fxdbsr.passes.plan_engines import seen_inputs


def tune_engines(model: nn.Module, lowering: Lowering) -> None:
    """Measure the candidates for every packed conv and take the fastest, where tuning was asked for.

    Raises:
        ValueError: the model's forward fails on the example inputs.
    """
    if not lowering.tune:
        return
    for layer, arguments in seen_inputs(model, lowering.example_inputs).items():
        layer.input_size = layer.size_of(arguments[0])
        with torch.inference_mode():
            take_fastest(layer, arguments)
