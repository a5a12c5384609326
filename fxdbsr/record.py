"""What a converted model is beyond its tensors, as plain data: its graph and the geometry of its layers.

A record names functions and never holds one. To run it, each name must be that of a function which the dense
model's own trace calls, or one of the few that the passes put in (`PASSES_CALL`): a file can put the model's steps
into another order, but run nothing that is not the model's. Every name that ends in the graph's code must be an
identifier, or, of a layer or a tensor, hold no quote.
"""

from __future__ import annotations

import builtins
import operator
import re
from collections.abc import Callable, Iterable
from types import EllipsisType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

FORMAT = 1
PASSES_CALL: tuple[Callable[..., Any], ...] = (
    *(torch.split, torch.index_select, torch.narrow, F.pad, operator.add, operator.getitem),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
)
PASSES_CALL_METHODS = ("reshape", "reshape_as")
_NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
_PATH = re.compile(r"[\w :/+@,=<>~-]+(\.[\w :/+@,=<>~-]+)*", re.ASCII)  # what no quote ends, in the code of a graph
_OPS = ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")
_TORCH = (torch.dtype, torch.memory_format, torch.layout)


def name_of(function: Callable[..., Any]) -> str:
    """A name of `function` that tells it from others."""
    name, path = function.__name__, getattr(function, "__qualname__", "<locals>")
    return f"{getattr(function, '__module__', None)}.{name if '<locals>' in path else path}"


def graph_record(graph: fx.Graph) -> list[Any]:
    """`graph` as [op, name, target, args, kwargs] for each node.

    Raises:
        ValueError: an argument that is no plain value; the message names the node.
    """
    nodes = []
    for node in graph.nodes:
        target = name_of(node.target) if node.op == "call_function" else str(node.target)
        try:
            nodes.append([node.op, node.name, target, _plain(node.args), _plain(node.kwargs)])
        except TypeError as error:
            raise ValueError(f"{node}: {error}") from error
    return nodes


def graph_from(record: Any, traced: Iterable[fx.Graph]) -> fx.Graph:
    """The graph that `graph_record` described, with the functions of the graphs `traced`.

    Raises:
        ValueError: it is damaged, or calls what `traced` does not call.
    """
    calls = [node for graph in traced for node in graph.nodes]
    functions = {name_of(f): f for f in PASSES_CALL}
    functions |= {name_of(node.target): node.target for node in calls if node.op == "call_function"}
    methods = {*PASSES_CALL_METHODS, *(node.target for node in calls if node.op == "call_method")}
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    try:
        for op, name, target, args, kwargs in record:
            _check(op, name, target)
            if op == "call_function" and target not in functions:
                raise ValueError(f"{name} calls {target}, which the model does not call")
            if op == "call_method" and target not in methods:
                raise ValueError(f"{name} calls the method {target}, which the model does not call")
            call = functions[target] if op == "call_function" else target
            arguments = _value(args, nodes), _keywords(_value(kwargs, nodes))
            nodes[name] = graph.create_node(op, call, *arguments, name)
        graph.lint()
    except (TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(f"damaged graph: {error!r}") from error
    return graph


def _check(op: Any, name: Any, target: Any) -> None:
    """Refuse what must not come into the graph's code."""
    if op not in _OPS:
        raise ValueError(f"damaged graph: {op!r} is no kind of node")
    form = _PATH if op in ("call_module", "get_attr") else _NAME
    for text, pattern in ((name, _NAME), (target, form)) if op != "call_function" else ((name, _NAME),):
        if not isinstance(text, str) or not pattern.fullmatch(text.lstrip("*") if op == "placeholder" else text):
            raise ValueError(f"damaged graph: {text!r} is no name")


def _keywords(kwargs: Any) -> dict[str, Any]:
    if not isinstance(kwargs, dict) or not all(isinstance(key, str) and key.isidentifier() for key in kwargs):
        raise ValueError(f"damaged graph: {kwargs!r} are no keyword arguments")
    return kwargs


def _plain(value: Any) -> Any:
    """`value`, an argument of a node, as what JSON can hold."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    match value:
        case fx.Node():
            return {"node": value.name}
        case tuple():
            return {"tuple": [_plain(item) for item in value]}
        case list():
            return [_plain(item) for item in value]
        case dict():
            return {"dict": [[_plain(key), _plain(item)] for key, item in value.items()]}
        case slice():
            return {"slice": [_plain(item) for item in (value.start, value.stop, value.step)]}
        case torch.device():
            return {"device": str(value)}
        case EllipsisType():
            return {"ellipsis": True}
        case _ if isinstance(value, _TORCH):
            return {"torch": str(value).removeprefix("torch.")}
    raise TypeError(f"{value!r} is no plain value")


def _value(data: Any, nodes: dict[str, fx.Node]) -> Any:
    """The inverse of `_plain`, where the nodes made so far are `nodes`."""
    if isinstance(data, list):
        return [_value(item, nodes) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    match kind:
        case "node":
            return nodes[content]
        case "tuple":
            return tuple(_value(item, nodes) for item in content)
        case "dict":
            return {_value(key, nodes): _value(item, nodes) for key, item in content}
        case "slice":
            return builtins.slice(*(_value(item, nodes) for item in content))
        case "device":
            return torch.device(content)
        case "ellipsis":
            return ...
        case "torch" if isinstance(found := getattr(torch, content), _TORCH):
            return found
    raise ValueError(f"damaged graph: {data!r} is no value")
