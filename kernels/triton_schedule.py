"""When the last multiprocessor is done: programs are started in the order of their numbers wherever there is room.

Programs of one union are alike, those of unions with more steps take longer, and come first: then the short ones
even out what the long ones leave, and the end is at most a third later than that of the best order (R. L. Graham,
Bounds on multiprocessing timing anomalies, 1969).
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapreplace
from math import ceil


def makespan(costs: Sequence[float], each: int, processors: int) -> float:
    """Clocks until all programs are done, one at a time on a processor.

    Args:
        costs: clocks of one program of each union, in the order in which they start.
        each: programs of each union.

    >>> makespan([3, 2], each=3, processors=2)
    8.0
    """
    rounds = 0.0  # what every processor does
    loads = [0.0] * processors
    for cost in costs:
        # once loads differ by less than one program, every processor gets one in turn
        even = max(0, each // processors - ceil((max(loads) - min(loads)) / cost) - 1)
        rounds += even * cost
        for _ in range(each - even * processors):
            heapreplace(loads, loads[0] + cost)
    return rounds + max(loads)
