"""The way of one microbatch through the nodes: A* in space and time."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from decentral.pipeline.skip.costs import Costs
from decentral.pipeline.skip.orders import START, Progress
from decentral.pipeline.skip.replay import Visit, itinerary, way_after
from decentral.pipeline.skip.schedule import Microbatch


class Window(NamedTuple):
    """A node that a microbatch keeps away from for a while."""

    node: int
    start_s: float
    end_s: float


class Limits(NamedTuple):
    """What one microbatch may not do: the constraints of conflict-based search."""

    banned: frozenset[int] = frozenset()
    """Nodes that it may not visit."""
    windows: frozenset[Window] = frozenset()
    """When it may not be at nodes; it waits before them."""

    def without(self, nodes: Sequence[int]) -> Limits:
        return self._replace(banned=self.banned.union(nodes))

    def avoiding(self, visit: Visit) -> Limits:
        return self._replace(windows=self.windows | {Window(visit.node, visit.start_s, visit.end_s)})


class Route(NamedTuple):
    """A path, and when a microbatch would be where that yields to nothing but its limits."""

    path: tuple[int, ...]
    visits: tuple[Visit, ...]

    @property
    def end_s(self) -> float:
        return self.visits[-1].end_s


class Router:
    """Finds the fastest routes over `length` stages, the first included; remembers what it has found."""

    def __init__(self, stages: Sequence[Sequence[int]], costs: Costs, length: int) -> None:
        self._stages, self._costs, self._length = stages, costs, length
        self._found: dict[tuple[Microbatch, Limits], Route | None] = {}
        self._rests: dict[tuple[int, int, Progress, int], float] = {}

    def route(self, microbatch: Microbatch, limits: Limits) -> Route | None:
        """Return the route that is back at its origin first, None if the limits leave none.

        A microbatch is ready when its origin has gone forward with those before it. What is left of a path, there and
        back, is known exactly but for the limits, and so never overestimated.
        """
        key = microbatch, limits
        if key not in self._found:
            self._found[key] = self._search(microbatch, limits)
        return self._found[key]

    def _search(self, microbatch: Microbatch, limits: Limits) -> Route | None:
        origin, costs = microbatch.origin, self._costs
        windows: dict[int, list[Window]] = {}
        for window in sorted(limits.windows):
            windows.setdefault(window.node, []).append(window)
        ready_s = microbatch.slot * costs.forward[origin]
        clock_s = _free(ready_s, costs.forward[origin], windows.get(origin, [])) + costs.forward[origin]
        # Of each way so far: the least at which it may be back, its nodes, when it is through them, the seconds back
        # along them, and its progress; None: back along them it goes too, and the least is when it is there.
        open_: list[tuple[float, tuple[int, ...], float, float, Progress | None]] = [
            (0.0, (origin,), clock_s, costs.backward(origin), START)
        ]
        while open_:
            _, path, clock_s, back_s, progress = heapq.heappop(open_)
            if progress is None:
                return Route(path, self._visits(path, ready_s, windows))
            here, left = path[-1], self._length - len(path)
            if left == 0:
                whole_s = self._visits(path, ready_s, windows)[-1].end_s
                heapq.heappush(open_, (whole_s, path, whole_s, 0.0, None))
                continue
            for stage, then in progress.ahead(len(self._stages)):
                for node in self._stages[stage]:
                    if node in limits.banned:
                        continue
                    way_s = costs.link(here, node)
                    arrival_s = _free(clock_s + way_s, costs.forward[node], windows.get(node, []))
                    through_s = arrival_s + costs.forward[node]
                    there_s = back_s + way_s + costs.backward(node)
                    bound_s = through_s + there_s + self._rest(origin, node, then, left - 1)
                    if bound_s < float("inf"):
                        heapq.heappush(open_, (bound_s, (*path, node), through_s, there_s, then))
        return None

    def _visits(self, path: Sequence[int], ready_s: float, windows: dict[int, list[Window]]) -> tuple[Visit, ...]:
        """Return when a microbatch is where on this path, as early as its windows allow."""
        visits: list[Visit] = []
        clock_s = ready_s
        for node, kind, seconds in itinerary(path, self._costs):
            if visits:
                clock_s = visits[-1].end_s + way_after(visits[-1], node, self._costs)
            clock_s = _free(clock_s, seconds, windows.get(node, []))
            visits.append(Visit(node, kind, clock_s, clock_s + seconds))
        return tuple(visits)

    def _rest(self, origin: int, node: int, progress: Progress, left: int) -> float:
        """Return the least seconds from a node on, over `left` more, to the loss, and back to the node; inf: no way."""
        key = origin, node, progress, left
        if key not in self._rests:
            costs = self._costs
            if left == 0:
                rest_s = 2 * costs.link(node, origin) + costs.loss(origin)
            else:
                rest_s = min(
                    (
                        2 * costs.link(node, to)
                        + costs.forward[to]
                        + costs.backward(to)
                        + self._rest(origin, to, then, left - 1)
                        for stage, then in progress.ahead(len(self._stages))
                        for to in self._stages[stage]
                    ),
                    default=float("inf"),
                )
            self._rests[key] = rest_s
        return self._rests[key]


def _free(arrival_s: float, seconds: float, windows: Sequence[Window]) -> float:
    """Return the first moment from `arrival_s` on at which there are so many seconds beside the windows, sorted."""
    for window in windows:
        if window.start_s < arrival_s + seconds and arrival_s < window.end_s:
            arrival_s = window.end_s
    return arrival_s
