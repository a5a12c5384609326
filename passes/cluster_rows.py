"""conv W[O, I], conv V[P, O] -> conv W[order], conv V[:, order]: block rows that read the same columns side by side.

A kernel that computes neighbouring rows together then reads fewer activations: of random masks with half of the
blocks, two rows read 0.75 of the columns as they come and 0.58 to 0.70 in order. Whole rows of blocks move, all
layers that make or read the channels move with them (`fxdbsr.channels.runs`), and the outputs stay equal but for the
order in which products are summed.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxdbsr.channels.flow import Flow
from fxdbsr.channels.rows import clustered
from fxdbsr.channels.runs import Run, Runs
from fxdbsr.nn.scaled import ScaledLayer
from fxdbsr.nn.shrink import permute_channelwise_, permute_layer_
from fxdbsr.passes.lowering import Lowering

MOST_ROWS = 512  # more are rows of single channels, which no kernel joins


def cluster_rows(model: fx.GraphModule, lowering: Lowering) -> None:
    """Put the rows of blocks of every conv whose channels may change their order into a better one."""
    flow = Flow(model)
    runs = Runs(flow)
    orders = {n: order for n, run in enumerate(runs.found) if (order := order_of(run, runs, n)) is not None}
    if not orders:
        return
    for link in {id(link.layer): link for link in reversed(flow.links)}.values():
        permute_layer_(link.layer, *runs.sides(link, orders))
    for module, labels in flow.channelwise.items():
        permute_channelwise_(module, runs.moved(labels, orders))


def order_of(run: Run, runs: Runs, number: int) -> Tensor | None:
    """The new order of the channels of `run`, or None where they stay."""
    whole = len(run.roots) // run.unit
    if not 3 <= whole <= MOST_ROWS or not (runs.of[run.roots] == number).all():
        return None
    masks, shift = [0] * whole, 0
    for link in run.makers:
        assert isinstance(link.layer, ScaledLayer)
        kept = link.layer.grid.nonzero(link.layer.weight)[:whole].cpu()
        for row, flags in enumerate(kept.tolist()):
            masks[row] |= sum(1 << column for column, flag in enumerate(flags) if flag) << shift
        shift += kept.shape[1]
    if len(set(masks)) == 1:
        return None
    blocks = torch.tensor(clustered(masks)).view(-1, 1) * run.unit + torch.arange(run.unit)
    return torch.cat([blocks.flatten(), torch.arange(whole * run.unit, len(run.roots))])
