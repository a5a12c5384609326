"""`ConvertedModule`: the GraphModule that `convert` returns. On a CPU its call is one run of the engine's steps.

The graph stays an ordinary graph of packed convs, and runs as one wherever something looks at it: gradients, hooks,
compilers, modes, tracers. Otherwise the second call with inputs of one shape makes a plan, and further calls run it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxdbsr.graph import called_module
from fxdbsr.kernels import jit
from fxdbsr.kernels.cpu_layout import Layout
from fxdbsr.kernels.ops import is_watched
from fxdbsr.network.operations import image_of, operation_of
from fxdbsr.network.plan import Plan, Run, view
from fxdbsr.nn.packed import PackedConv

PLANS = 16  # of different shapes that a model keeps


class _Recorder(fx.Interpreter):
    """Runs a graph and notes each value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.seen[n] = value.to("meta") if isinstance(value, Tensor) else value
        return value


class Instance:
    """Memory and arguments for one call of a plan at a time."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.arena = torch.zeros(plan.bytes + 4096, dtype=torch.uint8)
        base = -(-self.arena.data_ptr() // 4096) * 4096
        self.arena = self.arena[base - self.arena.data_ptr() :]
        self.blocks = [
            (item.program, item.program.block()) if isinstance(item, Run) and item.program else None for item in plan.items
        ]
        self.views = {
            node: view(self.arena, buffer, plan.batch, plan.dtype, plan.images[node].flat)
            for node, buffer in plan.buffers.items()
            if not buffer.outside and node in plan.operations and any(plan.is_torch(user) for user in node.users)
        }

    def run(self, inputs: dict[fx.Node, Any]) -> Any:
        plan = self.plan
        values: dict[fx.Node, Any] = {**self.views, **inputs}
        root = plan.graph.owning_module
        addresses = [self.arena.data_ptr()]
        for buffer in plan.outside:
            node = buffer.node
            if node in plan.operations:
                image = plan.images[node]
                shape = (plan.batch, *image.size, image.channels)
                y = torch.empty(shape, dtype=plan.dtype).permute(0, 3, 1, 2)
                values[node] = y.flatten(1) if image.flat else y
            addresses.append(values[node].data_ptr() if node in values else 0)
        for item, block in zip(plan.items, self.blocks, strict=True):
            if isinstance(item, Run):
                program, memory = block
                for i, buffer in enumerate(plan.outside, 1):
                    if addresses[i] == 0 and buffer.node in values:
                        x = values[buffer.node]
                        if x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last):
                            x = values[buffer.node] = x.contiguous(memory_format=torch.channels_last)
                        addresses[i] = x.data_ptr()
                program.fill(memory, addresses)
                program.run(memory)
            else:
                args = fx.node.map_arg(item.args, values.__getitem__)
                kwargs = fx.node.map_arg(item.kwargs, values.__getitem__)
                if item.op == "call_module":
                    values[item] = root.get_submodule(item.target)(*args, **kwargs)
                elif item.op == "get_attr":
                    found = root
                    for part in item.target.split("."):
                        found = getattr(found, part)
                    values[item] = found
                elif item.op == "call_method":
                    values[item] = getattr(args[0], item.target)(*args[1:], **kwargs)
                else:
                    values[item] = item.target(*args, **kwargs)
        for node, buffer in plan.buffers.items():
            if node not in values and buffer.node in values:
                values[node] = values[buffer.node]
        output = next(iter(reversed(plan.graph.nodes)))
        return fx.node.map_arg(output.args[0], values.__getitem__)
