"""Channels that hold a constant, or that nobody reads, leave the model: conv [O, I] -> conv [O', I'].

A row of zero blocks makes a channel constant, a column makes a channel unread; both reach other layers through
norms, activations, adds, concatenations and pools (`fxdbsr.channels`). Constants go into the readers' biases;
weights, norms and activations shrink. The outputs stay equal but for rounding. What stays because an operation
reads all its channels says so in the layer's `kept_channels`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxdbsr.channel_values import Value
from fxdbsr.channels import Flow, Link
from fxdbsr.nn.scaled import ScaledLayer
from fxdbsr.nn.shrink import Cut, cut_grid, cut_layer_, cut_norm_, cut_weight, from_constants, kept_weights, out_in
from fxdbsr.passes.lowering import Lowering
from fxdbsr.shuffles import name_shuffles


def remove_dead_channels(model: fx.GraphModule, lowering: Lowering) -> None:
    """Remove every channel that no output depends on, or on whose constant only biases depend."""
    shuffles = [(node, view, node.args[0]) for node, view in name_shuffles(model.graph).items()]
    flow = Flow(model)
    need = flow.needed()
    links = {id(link.layer): link for link in reversed(flow.links)}
    while sum(keep_whole_blocks(link, flow, need) for link in links.values()):
        flow.spread(need)
    for node, value in flow.values.items():
        if isinstance(value, list):
            sizes = [len(flow.keeps(need, part.labels)) for part in value]
            if sizes != [len(part.labels) for part in value]:
                cut_split(node, sizes, value[0].axis)
    for link in links.values():
        cut = cut_of(link, flow, need, absorb=True)
        if cut is not None:
            cut_layer_(link.layer, cut)
        layer_says(link, flow, need)
    for node, view, source in shuffles:
        cut_shuffle(node, view, (flow.values.get(source), flow.values.get(node)), flow, need)  # type: ignore[arg-type]
    for norm, labels in flow.norms.items():
        if len(keep := flow.keeps(need, labels)) < len(labels):
            cut_norm_(norm, keep)


def cut_of(link: Link, flow: Flow, need: Tensor, absorb: bool) -> Cut | None:
    """What stays of the layer of `link`, or None where all of it does; `absorb`: with the constants that go."""
    weight = out_in(link.layer)
    groups = getattr(link.layer, "groups", 1)
    outputs = flow.keeps(need, link.output)
    inputs = torch.arange(weight.shape[1] * groups)
    absorbed = None
    if link.input is not None:
        inputs = flow.keeps(need, link.input.labels)
        if groups == 1 and absorb:
            held = link.input.constant.nan_to_num().index_fill(0, inputs, 0.0)
            absorbed = from_constants(link.layer, held[None])
    if len(outputs) == weight.shape[0] and len(inputs) == weight.shape[1] * groups:
        return None
    kept_groups = 1 if groups == 1 else groups * len(outputs) // weight.shape[0]
    return Cut(outputs, inputs, kept_groups, absorbed)


def keep_whole_blocks(link: Link, flow: Flow, need: Tensor) -> bool:
    """Where the cut weight would hold more in its blocks than before, keep what is not a whole block.

    Marks those channels in `need`; False where there are none to mark.
    """
    layer = link.layer
    cut = cut_of(link, flow, need, absorb=False) if isinstance(layer, ScaledLayer) else None
    if cut is None or not isinstance(layer, ScaledLayer):
        return False
    after = kept_weights(cut_grid(layer, layer.grid, cut), cut_weight(layer, cut))
    if after <= kept_weights(layer.grid, out_in(layer)):
        return False
    count = int(need.sum())
    sides = [(link.output, layer.grid.rows())]
    if link.input is not None and layer.grid.groups == 1:
        sides.append((link.input.labels, layer.grid.columns()))
    for labels, spans in sides:
        for start, stop in spans:
            roots = flow.root[labels[start:stop]]
            if need[roots].any():
                need[roots] = True
    return int(need.sum()) > count


def cut_split(node: fx.Node, sizes: list[int], axis: int) -> None:
    """Let `node`, which cuts a value into a list, cut it into parts of `sizes`."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(torch.split, (node.args[0], sizes, axis))
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def cut_shuffle(node: fx.Node, view: fx.Node, values: tuple[Any, Any], flow: Flow, need: Tensor) -> None:
    """Let `node`, a named shuffle between `values`, pick what stays; the view again where all of it does."""
    before, after = values
    if not isinstance(before, Value) or not isinstance(after, Value) or need[flow.root[after.labels]].all():
        node.replace_all_uses_with(view)
        node.graph.erase_node(node)
        return
    places = torch.arange(len(before.labels))
    order = node.target(places[None], node.args[1])[0]  # type: ignore[operator]
    places[flow.keeps(need, before.labels)] = torch.arange(len(flow.keeps(need, before.labels)))
    name = f"{node.name}_order"
    model = flow.model
    device = next(model.parameters()).device
    model.register_buffer(name, places[order[flow.keeps(need, after.labels)]].to(device))
    with node.graph.inserting_before(node):
        index = node.graph.get_attr(name)
        new = node.graph.call_function(torch.index_select, (node.args[0], 1, index))
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def layer_says(link: Link, flow: Flow, need: Tensor) -> None:
    """Note at the layer of `link` why constant channels of its output are computed still."""
    roots = flow.root[link.output[~link.constant.isnan()]]
    roots = roots[need[roots]]
    if not len(roots):
        return
    why = "a conv that reads them pads with zeros, or channels that they are tied to are needed"
    for labels, reason in flow.pinned:
        if torch.isin(roots, flow.root[labels]).any():
            why = reason
            break
    link.layer.kept_channels = f"{len(roots)} constant channels stay: {why}"  # type: ignore[assignment]
