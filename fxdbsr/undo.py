"""A model as it was, after an error in the middle of its conversion."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx, nn

from fxdbsr.traced import STATE, graph_modules


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Put every module of `model`, and its graphs, back as they were where the body raises.

    The body may replace tensors, modules, classes and nodes; it does not write into tensors.
    """
    modules = [*dict.fromkeys([*model.modules(), *(part for _, part in graph_modules(model))])]
    before = [(module, type(module), dict(module.__dict__)) for module in modules]
    contents = [(state[part], copy.copy(state[part])) for _, _, state in before for part in STATE if part in state]
    graphs = [(module, copy.deepcopy(module.graph)) for module in modules if isinstance(module, fx.GraphModule)]
    try:
        yield
    except BaseException:
        for module, kind, state in before:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(state)
        for found, content in contents:
            found.clear()
            found.update(content)
        for module, graph in graphs:
            module.graph = graph
        raise
