"""How long functions take on a GPU: CUDA graphs of them, replayed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def graph_milliseconds(
    functions: Mapping[str, Callable[[], Any]], seconds: float = 0.2, calls: int = 10
) -> dict[str, float]:
    """Median milliseconds of a call of each function, replayed as CUDA graphs in turns for `seconds`."""
    samples = graph_samples(functions, seconds, calls)
    return {name: sorted(values)[len(values) // 2] for name, values in samples.items()}


def graph_samples(functions: Mapping[str, Callable[[], Any]], seconds: float, calls: int) -> dict[str, list[float]]:
    """Milliseconds of a call, one a round; every round replays each function's graph of `calls` calls once."""
    return replayed_in_turns({name: captured(function, calls) for name, function in functions.items()}, seconds, calls)


def replayed_in_turns(graphs: Mapping[str, torch.cuda.CUDAGraph], seconds: float, calls: int) -> dict[str, list[float]]:
    """Milliseconds of one of the `calls` calls that each graph holds, one value a round."""
    measured: dict[str, list[float]] = {name: [] for name in graphs}
    stop = time.monotonic() + seconds
    while time.monotonic() < stop or len(next(iter(measured.values()))) < 5:
        for name, graph in graphs.items():
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            measured[name].append(start.elapsed_time(end) / calls)
    return measured


def captured(function: Callable[[], Any], calls: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `calls` calls, after three to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph
