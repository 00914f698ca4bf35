"""Max-min fair shares by progressive filling: the level rises for all flows alike; a resource that fills freezes its.

With weights a flow's rate is its weight times the level: flows that share a bottleneck divide it as their weights are.
Bertsekas and Gallager, *Data Networks*, 2nd ed., section 6.5.2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import chain
from typing import TypeVar

K = TypeVar("K", bound=Hashable)

# Resources that should fill at the same level may compute it a few roundings apart. Levels this close are one level, so
# that equal flows get equal rates and finish together.
SAME_LEVEL = 1.0 + 1e-13


def max_min(
    flows: Sequence[Sequence[K]], capacity: Mapping[K, float], weights: Sequence[int] | None = None
) -> list[float]:
    """Return the max-min fair rate of each flow, given the resources that it crosses; of equal weights if None.

    Rates and capacities are in the same unit, such as bits per second. A capacity is 0 or more and may be infinite; a
    flow that crosses nothing finite has an infinite rate. Weights are whole numbers above 0, so that their sums are
    exact. Raises KeyError for a resource without a capacity.
    """
    users: dict[K, list[int]] = {}
    for flow, path in enumerate(flows):
        for resource in path:
            users.setdefault(resource, []).append(flow)
    weight_of = None if weights is None else dict(enumerate(weights))
    rates = fill(dict(enumerate(flows)), users, users, capacity, weight_of)
    return [rates.get(flow, math.inf) for flow in range(len(flows))]


def fill(
    paths: Mapping[int, Sequence[K]],
    resources: Iterable[K],
    users: Mapping[K, Collection[int]],
    capacity: Mapping[K, float],
    weights: Mapping[int, int] | None = None,
) -> dict[int, float]:
    """Return the rates of the flows that some finite resource limits.

    `paths` are the resources of each flow, `users` the flows of each resource, all of them in `paths`.
    """
    rates: dict[int, float] = {}
    waiting = {  # the weight of its flows that are not frozen; their number, if all weigh the same
        resource: len(users[resource]) if weights is None else sum([weights[flow] for flow in users[resource]])
        for resource in resources
    }
    spare = {resource: capacity[resource] for resource in waiting}  # what the frozen ones leave of it
    # The level at which a resource fills only rises while others fill, so an entry of the heap is a lower bound.
    heap = [(spare[resource] / count, order, resource) for order, (resource, count) in enumerate(waiting.items())]
    heapify(heap)
    while heap:
        level, full = _next_full(heap, spare, waiting)
        if level == math.inf:
            break
        frozen = dict.fromkeys([flow for resource in full for flow in users[resource] if flow not in rates], level)
        if weights is None:
            rates.update(frozen)
            freed: Mapping[K, int] = Counter(chain.from_iterable([paths[flow] for flow in frozen]))
        else:
            rates.update([(flow, level * weights[flow]) for flow in frozen])
            freed = _weigh(frozen, paths, weights)
        for resource, count in freed.items():
            waiting[resource] -= count
            spare[resource] -= level * count  # once a level, not once a flow: fewer roundings
    return rates


def _weigh(flows: Iterable[int], paths: Mapping[int, Sequence[K]], weights: Mapping[int, int]) -> dict[K, int]:
    """Return how much of these flows' weight crosses each resource."""
    total: dict[K, int] = {}
    for flow in flows:
        for resource in paths[flow]:
            total[resource] = total.get(resource, 0) + weights[flow]
    return total


def _next_full(heap: list[tuple[float, int, K]], spare: dict[K, float], waiting: dict[K, int]) -> tuple[float, list[K]]:
    """Take from the heap the resources that fill next, all of one level; infinity when no flow waits any more."""
    full: list[K] = []
    level = bound = math.inf
    while heap and heap[0][0] <= bound:
        estimate, order, resource = heappop(heap)
        if not waiting[resource]:
            continue
        fills_at = spare[resource] / waiting[resource]
        if fills_at > estimate * SAME_LEVEL:
            heappush(heap, (fills_at, order, resource))
            continue
        if not full:
            level = fills_at
            bound = level * SAME_LEVEL
        full.append(resource)
    return level, full
