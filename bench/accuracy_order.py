"""Channels in an order that gathers large weights into the same blocks; the net computes the same as before.

Channels that elementwise operations tie (`fxdbsr.channels`) move together: the rows of every weight that writes them,
the columns of every weight that reads them, their norms. For given kept blocks the best order of one such set is an
assignment problem: channel c in place p keeps the energy of its weights that then lie in kept blocks. Kept blocks and
orders take turns, and what is kept can only grow. After Ji et al., TETRIS, NeurIPS 2018, who reorder each layer of a
finished net; here the order changes while the net trains.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from fxdbsr.channels.flow import Flow
from fxdbsr.layers import BlockedLayer, blocked_layers
from fxdbsr.traced import TwoGraphModule

OUT, IN, NORM = "out", "in", "norm"


class ChannelOrder:
    """Reorders the channels of `model`, prepared with square blocks, and of the momentum of `optimizer`.

    Args:
        model: prepared.
        optimizer: of the model.
        weights: for each blocked layer what one unit of energy (squared weight) is worth.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, weights: list[float]) -> None:
        self.model, self.optimizer = model, optimizer
        self.layers, self.weights = blocked_layers(model), weights
        self.sets = channel_sets(model)

    @torch.no_grad()
    def improve_(self, keep: Callable[[list[Tensor]], list[Tensor]], rounds: int = 8) -> float:
        """Fold the scales into the weights and reorder the channels.

        Args:
            keep: scores of all blocks, a tensor a layer, to the blocks to keep, bool likewise.
            rounds: of kept blocks and orders in turns.

        Returns:
            How much more energy the kept blocks hold than in the old order, as a fraction of it.
        """
        fold_scales_(self.layers)
        energy = {
            layer.name: layer.weight.square().sum((2, 3)).double() * worth
            for layer, worth in zip(self.layers, self.weights, strict=True)
        }
        order = [torch.arange(len(places)) for places in self._sizes()]
        before = self._held(energy, keep)[0]
        best, best_order = before, list(order)
        for turn in range(rounds):
            kept = self._held(energy, keep)[1]
            for number, members in enumerate(self.sets):
                move = self._assignment(members, energy, kept) if turn else self._by_size(members, energy)
                if move is not None:
                    order[number] = order[number][move]
                    for name, kind in members:
                        if name in energy and kind != NORM:
                            energy[name] = energy[name][move] if kind == OUT else energy[name][:, move]
            if (held := self._held(energy, keep)[0]) > best:
                best, best_order = held, list(order)
        for members, places in zip(self.sets, best_order, strict=True):
            for name, kind in members:
                self._move(self.model.get_submodule(name), kind, places)
        return best / before - 1

    def _sizes(self) -> list[range]:
        sizes = []
        for members in self.sets:
            name, kind = members[0]
            module = self.model.get_submodule(name)
            tensor = module.weight
            assert isinstance(tensor, Tensor)
            sizes.append(range(tensor.shape[1 if kind == IN else 0]))
        return sizes

    def _held(
        self, energy: dict[str, Tensor], keep: Callable[[list[Tensor]], list[Tensor]]
    ) -> tuple[float, dict[str, Tensor]]:
        sums = [block_sums(layer, energy[layer.name]) for layer in self.layers]
        scores = [(s / layer.grid.numel()).float().flatten() for s, layer in zip(sums, self.layers, strict=True)]
        kept = [k.view(layer.grid.shape) for k, layer in zip(keep(scores), self.layers, strict=True)]
        held = sum(
            float((s / layer.grid.numel())[k].sum()) for s, k, layer in zip(sums, kept, self.layers, strict=True)
        )
        return held, {layer.name: k for k, layer in zip(kept, self.layers, strict=True)}

    def _assignment(
        self, members: list[tuple[str, str]], energy: dict[str, Tensor], kept: dict[str, Tensor]
    ) -> Tensor | None:
        """The best new order of one set, `new[place] = old place`; None where it has no blocked layer."""
        gain: Tensor | float = 0.0
        by_name = {layer.name: layer for layer in self.layers}
        for name, kind in members:
            if name not in by_name or kind == NORM:
                continue
            height, width = by_name[name].grid.block_size
            rows, columns = energy[name], kept[name].double()
            if kind == IN:
                rows, columns, height, width = rows.T, columns.T, width, height
            along = torch.nn.functional.pad(rows, (0, -rows.shape[1] % width)).unflatten(1, (-1, width)).sum(2)
            worth = along @ columns.T / by_name[name].grid.numel().max()
            gain = gain + worth.repeat_interleave(height, 1)[:, : len(rows)]
        if not isinstance(gain, Tensor):
            return None
        channels, places = linear_sum_assignment(gain.numpy(), maximize=True)
        new = torch.empty(len(channels), dtype=torch.long)
        new[torch.from_numpy(places)] = torch.from_numpy(channels)
        return new

    @staticmethod
    def _by_size(members: list[tuple[str, str]], energy: dict[str, Tensor]) -> Tensor | None:
        """Channels with much energy first."""
        parts = [energy[name].sum(1 if kind == OUT else 0) for name, kind in members if name in energy and kind != NORM]
        return torch.stack(parts).sum(0).argsort(descending=True) if parts else None

    def _move(self, module: nn.Module, kind: str, places: Tensor) -> None:
        tensors: list[Tensor] = [t for name, t in module.named_parameters() if name in ("weight", "bias")]
        if kind == NORM:
            tensors += [b for name, b in module.named_buffers() if name in ("running_mean", "running_var")]
        for tensor in tensors:
            axis = 1 if kind == IN else 0
            if kind == IN and tensor.dim() < 2:
                continue
            tensor.copy_(tensor.index_select(axis, places))
            state = self.optimizer.state.get(tensor, {}).get("momentum_buffer")
            if state is not None:
                state.copy_(state.index_select(axis, places))


def block_sums(layer: BlockedLayer, energy: Tensor) -> Tensor:
    """Sum of `energy [O, I]` over each block, `[rows, columns]`."""
    taps = layer.weight.shape[2] * layer.weight.shape[3]
    spread = (energy / taps)[:, :, None, None].expand(layer.weight.shape)
    return layer.grid.block_sum(spread)


def fold_scales_(layers: list[BlockedLayer]) -> None:
    """Multiply the weights by scales and masks, which become ones."""
    for layer in layers:
        layer.weight.copy_(layer.grid.scale(layer.weight, layer.scale * layer.mask))
        layer.scale.fill_(1)
        layer.set_mask(torch.ones_like(layer.mask))


def channel_sets(model: nn.Module) -> list[list[tuple[str, str]]]:
    """Which tensors hold the same channels in the same order, as (module, "out", "in" or "norm"), but for outputs."""
    probe = copy.deepcopy(model).eval()
    graph = probe.graph_module(False) if isinstance(probe, TwoGraphModule) else probe
    assert isinstance(graph, fx.GraphModule)
    flow = Flow(graph)
    names = {id(module): name for name, module in graph.named_modules()}
    pinned = {int(label) for labels, _ in flow.facts.pinned for label in flow.root[labels]}
    found: dict[tuple[int, ...], list[tuple[str, str]]] = defaultdict(list)
    for link in flow.links:
        found[tuple(flow.root[link.output].tolist())].append((names[id(link.layer)], OUT))
        if link.input is not None:
            found[tuple(flow.root[link.input.labels].tolist())].append((names[id(link.layer)], IN))
    for norm, labels in flow.channelwise.items():
        found[tuple(flow.root[labels].tolist())].append((names[id(norm)], NORM))
    roots = [set(key) for key in found]
    alone = [all(r == s or not r & s for s in roots) for r in roots]
    return [
        members
        for (key, members), free in zip(found.items(), alone, strict=True)
        if free and len(set(key)) == len(key) and not pinned & set(key) and any(kind == OUT for _, kind in members)
    ]
