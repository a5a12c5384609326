"""Layers that are one call in every graph, whoever traces: torch.fx, or torchvision's `create_feature_extractor`.

fxdbsr's own tracer asks modules for `is_leaf_in_trace`. Others go into a layer's forward with a stand-in for its
input; what they find there is this.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn


def call_in_graph(layer: nn.Module, input: fx.Proxy, *args: Any) -> Any:
    """The call `layer(input, *args)` in the graph that is being traced.

    Raises:
        NameError: `layer` is no part of the module that is traced.
    """
    path = input.tracer.path_of_module(layer)  # type: ignore[attr-defined]
    return input.tracer.create_proxy("call_module", path, (input, *args), {})
