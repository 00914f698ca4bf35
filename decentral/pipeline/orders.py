"""In which order workers go forward and back through the microbatches of a batch."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from decentral.pipeline.paths import BACK, Action, Ground, Hop, Path, Paths


class Timetable(NamedTuple):
    """The ways of a batch's microbatches, and what each worker does for them, in turn."""

    paths: tuple[Path, ...]
    actions: dict[int, list[Action]]


def timetable(paths: Paths, ground: Ground, draw: int, order: str) -> Timetable:
    """Return how a batch goes along these paths, in the order of that name unless they have one of their own."""
    ways, cut = tuple(paths.ways(ground, draw)), ground.cut
    shares = tuple(tuple(cut.share(hop.blocks) for hop in way.hops) for way in ways)
    return Timetable(ways, paths.order(ground, draw) or planned(ways, shares, order))


@lru_cache(maxsize=4)
def planned(paths: tuple[Path, ...], shares: tuple[tuple[float, ...], ...], order: str) -> dict[int, list[Action]]:
    """Return what each worker does, in turn, so that all microbatches go their ways and back.

    `shares[p][h]` is what hop h of path p costs. The order is that in which equal machines would do it on a network
    that takes no time, so nobody ever waits in a circle; workers keep to it whatever things really take, so that sums
    are made in one order and come to the same bits.

    "1f1b": a worker goes back as soon as it can, and takes up no more microbatches than there are hops left on their
    way (PipeDream-Flush, Narayanan et al., 2021). "gpipe": forward through all, then back through all (Huang et al.,
    2019), in the same order of microbatches.
    """
    return _Plan(paths, shares, order).run()


class _Plan:
    """Workers that do one thing after the other in their own time."""

    def __init__(self, paths: Sequence[Path], shares: Sequence[Sequence[float]], order: str) -> None:
        self._paths, self._shares = paths, shares
        self._allowed = ORDERS[order]
        self.actions: dict[int, list[Action]] = {hop.worker: [] for path in paths for hop in path.hops}
        self.ready: dict[int, list[Action]] = defaultdict(list)
        self.under_way: dict[int, set[int]] = defaultdict(set)  # by worker: paths gone forward and not yet back
        self.forward_left: dict[int, int] = defaultdict(int)
        self._running: list[tuple[float, int, Action]] = []
        self._busy: set[int] = set()
        for number, path in enumerate(paths):
            for hop in path.hops:
                self.forward_left[hop.worker] += 1
            self.ready[path.hops[0].worker].append(Action("forward", number, 0))

    def hop(self, action: Action) -> Hop:
        return self._paths[action.path].hops[action.place]

    def hops_left(self, action: Action) -> int:
        return len(self._paths[action.path].hops) - action.place

    def run(self) -> dict[int, list[Action]]:
        now, left = 0.0, 2 * sum(len(path.hops) for path in self._paths)
        while left:
            self._start_all(now)
            if not self._running:  # all wait for room: the first microbatch gets it, so there is an end
                self._start(min((each for each in self._all_ready()), key=self._rank), now)
            now = self._running[0][0]
            while self._running and self._running[0][0] == now:
                self._done(heapq.heappop(self._running)[2])
                left -= 1
        return self.actions

    def _start_all(self, now: float) -> None:
        for worker in sorted(self.ready):
            if worker not in self._busy:
                able = [action for action in self.ready[worker] if self._allowed(self, worker, action)]
                if able:
                    self._start(min(able, key=self._rank), now)

    def _start(self, action: Action, now: float) -> None:
        worker = self.hop(action).worker
        self.ready[worker].remove(action)
        self.actions[worker].append(action)
        self._busy.add(worker)
        if action.kind == "forward":
            self.under_way[worker].add(action.path)
            self.forward_left[worker] -= 1
        cost = self._shares[action.path][action.place] * (1 if action.kind == "forward" else BACK)
        heapq.heappush(self._running, (now + cost, worker, action))

    def _done(self, action: Action) -> None:
        worker, path = self.hop(action).worker, self._paths[action.path]
        self._busy.discard(worker)
        if action.kind == "forward" and action.place + 1 < len(path.hops):
            following = action._replace(place=action.place + 1)
        elif action.kind == "forward":
            following = action._replace(kind="backward")
        elif action.place:
            following = action._replace(place=action.place - 1)
        else:
            following = None
        if action.kind == "backward" and not any(hop.worker == worker for hop in path.hops[: action.place]):
            self.under_way[worker].discard(action.path)
        if following is not None:
            self.ready[self.hop(following).worker].append(following)

    def _all_ready(self) -> list[Action]:
        return [action for actions in self.ready.values() for action in actions]

    def _rank(self, action: Action) -> tuple[bool, int, int, int]:
        """Back before forward, then by microbatch; of one microbatch what is further on its way."""
        path = self._paths[action.path]
        return action.kind == "forward", path.microbatch, path.replica, -action.place


def _one_forward_one_backward(plan: _Plan, worker: int, action: Action) -> bool:
    held = plan.under_way[worker]
    return action.kind == "backward" or action.path in held or len(held) < plan.hops_left(action)


def _forward_first(plan: _Plan, worker: int, action: Action) -> bool:
    return action.kind == "forward" or not plan.forward_left[worker]


ORDERS: dict[str, Callable[[_Plan, int, Action], bool]] = {
    "1f1b": _one_forward_one_backward,
    "gpipe": _forward_first,
}
"""What a worker may do, by the order's name in run files."""
