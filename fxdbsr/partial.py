"""Models that torch.fx cannot trace as a whole: their largest submodules that it can, and single layers elsewhere.

The parts become graph modules in their places; the code around them (loops over feature levels, control flow on
values) runs as it is, and calls them as before. Layers that this code calls itself are put into one graph of their
own for the time that passes run over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import fx, nn

from fxdbsr.nn.packed import PackedConv
from fxdbsr.nn.scaled import plain_type
from fxdbsr.reach import codes, uses_of, why_not_called
from fxdbsr.traced import TracedModule, TwoGraphModule, why_no_target

Part = TypeVar("Part", bound=nn.Module)


def trace_parts(root: nn.Module, tracer: Callable[[nn.Module], TracedModule | TwoGraphModule]) -> dict[str, str]:
    """Replace the largest submodules of `root` that `tracer` can trace by their graphs, in place.

    Returns:
        Why submodules with layers are no part of a graph, by name: those that a larger one could have been.
    """
    reasons: dict[str, str] = {}
    done: dict[int, nn.Module] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in list(module.named_children()):
            if id(child) in done:
                module.add_module(name, done[id(child)])
            if id(child) in done or is_layer(child) or not any(is_layer(m) for m in child.modules()):
                continue
            if type(child) not in (nn.ModuleList, nn.ModuleDict):
                why = why_not_called(child, name, module, root)
                try:
                    if why is None:
                        done[id(child)] = as_part(child, tracer(child))
                        module.add_module(name, done[id(child)])
                        continue
                except ValueError as error:
                    why = str(error)
                reasons[f"{prefix}{name}"] = why
            visit(child, f"{prefix}{name}.")

    visit(root, "")
    for name, layer in _outside(root):
        if is_layer(layer) and (why := why_not_lone(name, layer, root)) is not None:
            reasons[name] = why
    return reasons


def is_layer(module: nn.Module) -> bool:
    """True for conv and linear layers, plain, scaled or packed."""
    return isinstance(module, PackedConv) or plain_type(type(module)) is not None


def as_part(module: nn.Module, part: Part) -> Part:
    """`part` with the plain attributes of `module`, whose place it takes: the code around it may read them."""
    plain = [name for name in module.__dict__ if name not in part.__dict__]
    part.__dict__.update({name: module.__dict__[name] for name in plain}, _plain=plain)
    return part


def parts_of(root: nn.Module) -> dict[str, TracedModule | TwoGraphModule | fx.GraphModule]:
    """The outermost graph modules of `root` by name."""
    return {name: m for name, m in _outside(root) if isinstance(m, fx.GraphModule | TwoGraphModule)}


def lone_layers(root: nn.Module) -> fx.GraphModule:
    """A graph that calls each layer of `root` outside of its parts once, under its own name, on an input of its own."""
    graph = fx.Graph()
    outputs: list[fx.Node] = []
    for name, layer in _outside(root):
        if is_layer(layer) and why_not_lone(name, layer, root) is None:
            x = graph.placeholder(f"x{len(outputs)}")
            outputs.append(graph.call_module(name, (x,)))
    graph.output(tuple(outputs))
    return fx.GraphModule(root, graph)


def why_not_lone(name: str, layer: nn.Module, root: nn.Module) -> str | None:
    """Why `layer`, which code outside of all graphs calls, stays as it is, as a sentence, or None."""
    if why := why_no_target(name):
        return why
    code = [one for module in root.modules() for one in codes(type(module)) if layer in module.children()]
    used = uses_of(name.rpartition(".")[2], code)
    return (
        f"the code around it uses {', '.join(f'its {word}' if word else 'it as a value' for word in sorted(used))}"
        if used
        else None
    )


def _outside(root: nn.Module, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Every module below `root`, once, but for those below graph modules."""
    seen = set() if seen is None else seen
    for name, child in root.named_children():
        if id(child) in seen:
            continue
        seen.add(id(child))
        yield f"{prefix}{name}", child
        if not isinstance(child, fx.GraphModule | TwoGraphModule):
            yield from _outside(child, f"{prefix}{name}.", seen)


def put_back(root: nn.Module, replaced: dict[nn.Module, Any]) -> None:
    """Put `replaced[module]` in every place of `root` where `module` is."""
    for owner in list(root.modules()):
        for name, child in list(owner._modules.items()):
            if child is not None and child in replaced:
                owner.add_module(name, replaced[child])
