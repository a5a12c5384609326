"""Channels that hold a constant, or that nobody reads, leave the model: conv [O, I] -> conv [O', I'].

A row of zero blocks makes a channel constant, a column makes a channel unread; both reach other layers through
norms, activations, adds, concatenations and pools (`fxdbsr.channels`). Constants go into the readers' biases;
weights, norms and activations shrink. The outputs stay equal but for rounding. What stays because an operation
reads all its channels says so in the layer's `kept_channels`.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxdbsr.channels.facts import Kept
from fxdbsr.channels.flow import Flow
from fxdbsr.channels.layers import Link
from fxdbsr.nn.scaled import ScaledLayer
from fxdbsr.nn.shrink import (
    Cut,
    cut_channelwise_,
    cut_grid,
    cut_layer_,
    cut_weight,
    from_constants,
    kept_weights,
    out_in,
)
from fxdbsr.passes.lowering import Lowering


def remove_dead_channels(model: fx.GraphModule, lowering: Lowering) -> None:
    """Remove every channel that no output depends on, or on whose constant only biases depend."""
    flow = Flow(model)
    need = flow.needed()
    links = {id(link.layer): link for link in reversed(flow.links)}
    while True:
        settled = flow.kept(need.clone())  # what is marked is settled only when it has spread
        if not sum(keep_whole_blocks(link, flow, settled, need) for link in links.values()):
            break
        flow.spread(need)
    kept, gone = flow.kept(need), flow.gone(need)
    for edit in flow.facts.edits:
        if edit.node not in gone:
            edit.apply(kept, model)
    for link in [link for link in links.values() if kept.count(link.output)]:
        cut = cut_of(link, kept, absorb=True)
        if cut is not None:
            cut_layer_(link.layer, cut)
        layer_says(link, flow, kept)
    for module, labels in flow.channelwise.items():
        if kept.count(labels) and not kept.whole(labels):
            cut_channelwise_(module, kept.positions(labels))


def cut_of(link: Link, kept: Kept, absorb: bool) -> Cut | None:
    """What stays of the layer of `link`, None for all or nothing of it; `absorb`: with the constants that go."""
    weight, groups = out_in(link.layer), link.groups
    outputs = kept.positions(link.output)
    inputs = torch.arange(weight.shape[1] * groups)
    absorbed = None
    if link.input is not None:
        inputs = kept.positions(link.input.labels)
        if absorb:
            held = link.input.constant.nan_to_num().index_fill(0, inputs, 0.0)
            absorbed = from_constants(link.layer, held.view(groups, -1))
    if not len(outputs) or (len(outputs) == weight.shape[0] and len(inputs) == weight.shape[1] * groups):
        return None
    alive = int(kept.flags(link.output).view(groups, -1).any(1).sum())
    return Cut(outputs, inputs, alive, absorbed)


def keep_whole_blocks(link: Link, flow: Flow, settled: Kept, need: Tensor) -> bool:
    """Where the weight cut to what is `settled` would hold more in its blocks, keep what is not a whole block.

    Marks those channels in `need`; False where there are none to mark.
    """
    layer = link.layer
    cut = cut_of(link, settled, absorb=False) if isinstance(layer, ScaledLayer) else None
    if cut is None or not isinstance(layer, ScaledLayer):
        return False
    after = kept_weights(cut_grid(layer.grid, cut), cut_weight(link.nonzero, cut))
    if after <= kept_weights(layer.grid, link.nonzero):
        return False
    count = int(need.sum())
    sides = [(link.output, list(layer.grid.rows()))]
    if link.input is not None:
        sides += [(labels, list(layer.grid.columns())) for labels in link.input.labels.view(link.groups, -1)]
    for labels, spans in sides:
        for start, stop in spans:
            roots = flow.root[labels[start:stop]]
            if need[roots].any():
                need[roots] = True
    return int(need.sum()) > count


def layer_says(link: Link, flow: Flow, kept: Kept) -> None:
    """Note at the layer of `link` why constant channels of its output are computed still."""
    constant = link.output[~link.constant.isnan()]
    roots = flow.root[constant[kept.flags(constant)]]
    if not len(roots):
        return
    why = "a conv that reads them pads with zeros, or channels that they are tied to are needed"
    for labels, reason in flow.facts.pinned:
        if torch.isin(roots, flow.root[labels]).any():
            why = reason
            break
    stay = "1 constant channel stays" if len(roots) == 1 else f"{len(roots)} constant channels stay"
    link.layer.kept_channels = f"{stay}: {why}"  # type: ignore[assignment]
