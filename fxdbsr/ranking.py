"""Which blocks to switch off: scores that compare blocks, and the choice of the lowest up to a given cost.

The score "l2" is the mean square of a block's scaled weights, `s^2 * sum(W^2) / numel(block)` with the real
number of weights of edge blocks; it compares blocks of all layers. "scale" is |s| alone: behind a batch norm
it means something within a row of blocks only. "random" is for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor, nn

from fxdbsr.bypass import Bypass
from fxdbsr.layers import BlockedLayer, blocked_layers
from fxdbsr.nn.scaling import effective_scale
from fxdbsr.ranks import whole
from fxdbsr.scales import check_fraction

SCORES = ("l2", "scale", "random")
SCOPES = ("layer", "global")


@torch.no_grad()
def block_prune_(
    model: nn.Module,
    sparsity: float,
    score: str = "l2",
    scope: str = "layer",
    protect: bool = True,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Switch off the masks of `round(sparsity * n)` blocks of a prepared model, in one shot.

    They stay off in training. Blocks that are zero already count, and go first.

    Args:
        model: prepared; changed in place.
        sparsity: fraction of the blocks to switch off, in [0, 1].
        score: "l2", "scale" or "random": the blocks with the lowest go.
        scope: "layer": that fraction of every layer's blocks; "global": of all blocks together.
        protect: keep the last block of a conv where without it an output would no longer depend on an input.
        generator: for the score "random".

    Returns:
        `model`.

    Raises:
        ValueError: an argument out of its range, NaN in a score (the layer is named), a model not prepared or on the
            meta device.
        TypeError: an argument of another type.
    """
    layers = blocked_layers(model)
    sparsity = check_fraction(sparsity, "sparsity")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {generator!r}")
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {SCOPES}, got {scope!r}")
    survives = Bypass(model, layers).survives if protect else None
    scores = block_scores(layers, score, generator)
    scores = [s.masked_fill(~layer.alive().flatten().cpu(), -1) for s, layer in zip(scores, layers, strict=True)]
    sizes = [len(s) for s in scores]
    if scope == "global":
        amount = round(sparsity * sum(sizes))
        off = lowest(torch.cat(scores), torch.ones(sum(sizes)), sizes, amount, survives)
    else:
        off = torch.cat(lowest_of_each(scores, sparsity, survives))
    for layer, lost in zip(layers, off.split_with_sizes(sizes), strict=True):
        layer.set_mask(layer.mask & ~lost.view(layer.grid.shape).to(layer.mask.device))
    return model


@torch.no_grad()
def block_scores(
    layers: Sequence[BlockedLayer],
    score: str = "l2",
    generator: torch.Generator | None = None,
    scales: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The score of every block, none negative: float32 `[rows * columns]` on the CPU for each layer.

    Args:
        layers: of a prepared model.
        score: one of `SCORES`.
        generator: for "random".
        scales: `scale_sizes` of another time, to take in the place of the present ones.

    Raises:
        ValueError: an unknown `score`; NaN in one, with the layer's name; weights that have no values.
    """
    for layer in layers:
        if layer.weight.is_meta:
            raise ValueError(f"{layer.name}: expected weights that hold values, got some on the meta device")
    if score not in SCORES:
        raise ValueError(f"score: expected one of {SCORES}, got {score!r}")
    sizes = [layer.grid.shape[0] * layer.grid.shape[1] for layer in layers]
    if score == "random":
        device = "cpu" if generator is None else generator.device
        return list(torch.rand(sum(sizes), generator=generator, device=device).cpu().split_with_sizes(sizes))
    found = []
    for number, layer in enumerate(layers):
        value = _scale_size(layer)
        if scales is not None:
            value = torch.where(value.isnan(), value, scales[number].to(value.device))
        if score == "l2":
            numel = layer.grid.numel().to(value.device)
            value = value.square() * layer.grid.block_sum(whole(layer.weight).float().square()) / numel
        found.append(value.flatten())
    devices = {value.device for value in found}
    together = torch.cat(found if len(devices) == 1 else [value.cpu() for value in found]).cpu()
    scores = list(together.split_with_sizes(sizes))
    if bool(together.isnan().any()):
        broken = next(i for i, s in enumerate(scores) if bool(s.isnan().any()))
        raise ValueError(f"{layers[broken].name}: its weight or its scale holds NaN")
    return scores


@torch.no_grad()
def scale_sizes(layers: Sequence[BlockedLayer]) -> list[Tensor]:
    """What the scales multiply blocks by, without sign or mask: float32 `[rows, columns]` on the CPU for each layer."""
    return [_scale_size(layer).cpu() for layer in layers]


def _scale_size(layer: BlockedLayer) -> Tensor:
    return effective_scale(whole(layer.scale).float(), torch.ones_like(layer.mask), layer.form).abs()


def lowest(
    scores: Tensor,
    costs: Tensor,
    sizes: Sequence[int],
    amount: float,
    survives: Callable[[AbstractSet[int]], bool] | None = None,
) -> Tensor:
    """The blocks with the lowest scores whose cost together is nearest to `amount`, bool `[blocks]`.

    Args:
        scores: `[blocks]`, all layers one after the other.
        costs: `[blocks]`; blocks that cost nothing are left alone.
        sizes: number of blocks of each layer.
        amount: cost to reach, missed by at most half the cost of the block at the border.
        survives: whether the layers of a set may lose all blocks; where they may not, the layer whose last
            block has the highest score keeps that one. None: every layer may.
    """
    order = scores.argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    free = costs[order].double()
    last = [int(r.max()) for r in rank.split_with_sizes(list(sizes))]
    by_last = sorted((i for i in range(len(last)) if free[last[i]] > 0), key=last.__getitem__)
    dead: set[int] = set()
    next_layer = 0
    while True:
        count = _nearest(free.cumsum(0), amount)
        reached = next_layer
        while survives is not None and reached < len(by_last) and last[by_last[reached]] < count:
            layer = by_last[reached]
            if survives(dead | {layer}):
                dead.add(layer)
            else:
                free[last[layer]] = 0
            reached += 1
        if reached == next_layer:
            break
        next_layer = reached
    off = torch.zeros(len(order), dtype=torch.bool)
    off[order[:count]] = free[:count] > 0
    return off


def _nearest(totals: Tensor, amount: float) -> int:
    """How many first entries of what `totals` sums come nearest to `amount`."""
    slack = 1e-9 * float(totals[-1])
    count = min(int(torch.searchsorted(totals, amount - slack)) + 1, len(totals))
    before = float(totals[count - 2]) if count > 1 else 0.0
    return count - 1 if amount - before < float(totals[count - 1]) - amount else count


def lowest_of_each(
    scores: Sequence[Tensor], sparsity: float, survives: Callable[[AbstractSet[int]], bool] | None = None
) -> list[Tensor]:
    """The `round(sparsity * n)` lowest of each layer's n blocks, bool; `survives` as in `lowest`."""
    found: list[Tensor] = []
    dead: set[int] = set()
    for layer, score in enumerate(scores):
        count = round(sparsity * len(score))
        if count == len(score) and survives is not None:
            if survives(dead | {layer}):
                dead.add(layer)
            else:
                count -= 1
        found.append(torch.zeros(len(score), dtype=torch.bool))
        found[-1][score.argsort(stable=True)[:count]] = True
    return found
