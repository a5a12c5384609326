"""Which blocks of a prepared model lie on a live path: their inputs vary, and their outputs are read."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from fxdbsr.channels.flow import Flow
from fxdbsr.layers import blocked_layers
from fxdbsr.traced import TwoGraphModule


class LivePaths:
    """Answers for sets of kept blocks of `model`, which stays as it is.

    A copy of its graph of evaluation holds ones for kept weights and no biases, so that the only constants are zeros.
    """

    def __init__(self, model: nn.Module) -> None:
        probe = copy.deepcopy(model).eval()
        graph = probe.graph_module(False) if isinstance(probe, TwoGraphModule) else probe
        assert isinstance(graph, fx.GraphModule)
        self._graph, self._layers = graph, blocked_layers(graph)
        for module in graph.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor in (module.bias, module.running_mean):
                    if tensor is not None:
                        tensor.detach().zero_()
            elif isinstance(getattr(module, "bias", None), Tensor):
                module.bias.detach().zero_()  # type: ignore[operator]

    @torch.no_grad()
    def useful(self, kept: list[Tensor]) -> list[Tensor]:
        """For each layer the blocks of `kept` (bool, flat) that carry something, bool."""
        for layer, keep in zip(self._layers, kept, strict=True):
            layer.weight.copy_(layer.grid.expand_mask(keep.view(layer.grid.shape)))
        flow = Flow(self._graph)
        need = needed_channels(flow)
        links = {id(link.layer): link for link in flow.links}
        found = []
        for layer, keep in zip(self._layers, kept, strict=True):
            link = links[id(layer.users[0])]
            weights = (link.reads & need[flow.root[link.output]][:, None]).to(layer.weight.dtype)
            weights = weights[(..., *(None,) * (layer.weight.dim() - 2))].expand(layer.weight.shape)
            found.append((layer.grid.block_sum(weights) > 0).flatten() & keep)
        return found


def needed_channels(flow: Flow) -> Tensor:
    """`[variables]` bool: what an output depends on; unlike `Flow.needed` it may be no channel of a dead branch."""
    need = torch.zeros(flow.facts.size, dtype=torch.bool)
    for labels, _ in flow.facts.pinned:
        need[flow.root[labels]] = True
    kept = -1
    while kept != (kept := int(need.sum())):
        for link in reversed(flow.links):
            if link.input is not None:
                read = link.reads[need[flow.root[link.output]]].any(0)
                need[flow.root[link.input.labels[read]]] = True
    return need
