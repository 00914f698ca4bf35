"""One iteration of a pipeline as it would go: an event simulation that knows paths and costs, and nothing of a plan."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Literal, NamedTuple

from decentral.errors import ConfigError
from decentral.pipeline.skip.costs import Costs

Kind = Literal["forward", "loss", "backward"]


class Visit(NamedTuple):
    """One microbatch at one node, from when to when in seconds."""

    node: int
    kind: Kind
    start_s: float
    end_s: float


class Replay(NamedTuple):
    """When each microbatch was where, in its own order, and when the last one was back."""

    visits: tuple[tuple[Visit, ...], ...]
    makespan_s: float


def itinerary(path: Sequence[int], costs: Costs) -> list[tuple[int, Kind, float]]:
    """Return where a microbatch goes, what for, and the seconds it takes there: `2 L + 1` visits for a path of L nodes.

    Forward along the path, to its origin for the loss, and back the way it came.
    """
    forward: list[tuple[int, Kind, float]] = [(node, "forward", costs.forward[node]) for node in path]
    back: list[tuple[int, Kind, float]] = [(node, "backward", costs.backward(node)) for node in reversed(path)]
    return [*forward, (path[0], "loss", costs.loss(path[0])), *back]


def way_after(visit: Visit, to: int, costs: Costs) -> float:
    """Return the seconds from a visit to the next node. Gradients, which the loss sends first, go against the link."""
    return costs.link(visit.node, to) if visit.kind == "forward" else costs.link(to, visit.node)


def replay(paths: Sequence[Sequence[int]], costs: Costs, memory: int | None = None) -> Replay:
    """Replay one iteration; `paths[m]` are microbatch m's nodes from its origin on.

    All microbatches are at their origins at time 0. A node does one thing at a time and never waits while there is
    something to do: losses and backward passes before forward passes, then what came first, then the lower microbatch.
    It begins no forward pass while it holds `memory` microbatches, from their forward pass to the end of their backward
    pass; None: it holds any number. Links carry any number of microbatches at once. Raises `ConfigError` if the
    microbatches end up waiting for one another's memory in a circle, which takes paths in different orders.
    """
    plans = [itinerary(path, costs) for path in paths]
    visits: list[list[Visit]] = [[] for _ in paths]
    arrivals = [(0.0, microbatch) for microbatch in range(len(paths))]
    ends: list[tuple[float, int]] = []
    waiting: dict[int, list[tuple[bool, float, int]]] = {node: [] for path in paths for node in path}
    busy: set[int] = set()
    held = dict.fromkeys(waiting, 0)
    while arrivals or ends:
        now = min(queue[0][0] for queue in (arrivals, ends) if queue)
        touched = set()
        while ends and ends[0][0] == now:
            _, microbatch = heapq.heappop(ends)
            last, plan = visits[microbatch][-1], plans[microbatch]
            busy.discard(last.node)
            touched.add(last.node)
            held[last.node] -= last.kind == "backward"
            if len(visits[microbatch]) < len(plan):
                to = plan[len(visits[microbatch])][0]
                heapq.heappush(arrivals, (now + way_after(last, to, costs), microbatch))
        while arrivals and arrivals[0][0] == now:
            _, microbatch = heapq.heappop(arrivals)
            node, kind, _ = plans[microbatch][len(visits[microbatch])]
            heapq.heappush(waiting[node], (kind == "forward", now, microbatch))
            touched.add(node)
        for node in touched:
            queue = waiting[node]
            if node in busy or not queue or (queue[0][0] and held[node] == memory):
                continue
            _, _, microbatch = heapq.heappop(queue)
            _, kind, seconds = plans[microbatch][len(visits[microbatch])]
            visits[microbatch].append(Visit(node, kind, now, now + seconds))
            heapq.heappush(ends, (now + seconds, microbatch))
            busy.add(node)
            held[node] += kind == "forward"
    if any(waiting.values()):
        stuck = sorted(node for node, queue in waiting.items() if queue)
        raise ConfigError(
            f"memory: with {memory} microbatches at each node, those at nodes {stuck} wait for one another for ever; "
            "allow more, or take paths that go through the stages in the same order"
        )
    return Replay(tuple(map(tuple, visits)), max((each[-1].end_s for each in visits), default=0.0))
