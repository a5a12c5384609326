"""max_pool2d(x) -> the same by `fxdbsr.nn.pool.MaxPool2d`, which on a GPU reads channels that lie last.

And back, for a model of torch's own layers. Pools that give indices or round sizes up stay as they are.
"""

from __future__ import annotations

from torch import fx, nn

from fxdbsr.graph import called_module
from fxdbsr.nn.pool import MaxPool2d, pack
from fxdbsr.passes.lowering import Lowering


def pack_pools(model: fx.GraphModule, lowering: Lowering) -> None:
    """Make the max pools that the graph calls `fxdbsr.nn.pool.MaxPool2d`, attributes and hooks as they are."""
    for module in _called(model):
        pack(module)


def unpack_pools(model: fx.GraphModule, lowering: Lowering) -> None:
    """Make them `torch.nn.MaxPool2d` again."""
    for module in _called(model):
        if type(module) is MaxPool2d:
            module.__class__ = nn.MaxPool2d  # type: ignore[assignment]


def _called(model: fx.GraphModule) -> list[nn.Module]:
    modules = (called_module(node) for node in model.graph.nodes)
    return [module for module in modules if module is not None]
