"""`Trace`: real preemptions, replayed on a fleet."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import ClassVar

from decentral.errors import ConfigError
from decentral.fleet.churn import Churn, Sites
from decentral.fleet.events import Event
from decentral.fleet.traces import TRACES, Change, read_trace
from decentral.fleet.units import PositiveNumber, Seconds
from decentral.naming import nearest
from decentral.replica import seed_of


class Trace(Churn):
    """Machines come and go as they did in a trace (`decentral.fleet.traces` has the formats).

    A machine that comes is played by the lowest worker that is free, until it goes; one that comes when no worker is
    free is left out for its whole life. Where a trace only counts machines, the seed says which one goes. After the
    trace's end, or `duration_s`, nothing happens any more. Sites play no part.
    """

    name: ClassVar[str] = "trace"

    source: str
    """"bamboo:p3", "bamboo:g4dn" or "bamboo:a100", or a file of one's own."""
    begin_s: Seconds = 0.0
    """How far into the trace the run begins, in the trace's seconds."""
    duration_s: PositiveNumber | None = None
    """How much of the trace is played, in the trace's seconds; unset: all that is left."""
    speed_up: PositiveNumber = 1.0
    """How many seconds of the trace pass in one second of the run."""

    def events(self, sites: Sites, seed: int) -> Iterator[Event]:
        """Yield the trace's preemptions and joins."""
        events: list[Event] = []
        free = list(range(len(sites)))  # a heap
        free_since = [0.0] * len(sites)
        played: dict[str, tuple[int, float]] = {}  # by node: the worker, and when it came
        for change in self._window(seed):
            node, at_s = str(change.node), (change.at_s - self.begin_s) / self.speed_up
            if not change.came and node in played:
                worker, came_s = played.pop(node)
                told_s = max(at_s - self.notice_s, came_s)
                events.append(Event(at_s=told_s, kind="preempt", worker=worker, notice_s=at_s - told_s))
                heapq.heappush(free, worker)
                free_since[worker] = events[-1].gone_at_s
            elif change.came and free:
                worker = heapq.heappop(free)
                came_s = max(at_s, free_since[worker])  # rounding must not let it come before it has gone
                played[node] = worker, came_s
                if change.at_s > self.begin_s:
                    events.append(Event(at_s=came_s, kind="join", worker=worker))
        return iter(sorted(events, key=lambda event: event.at_s))

    def starters(self, sites: Sites) -> frozenset[int]:
        """Return the workers who play machines that are there when the run begins."""
        return frozenset(range(min(self._at_first(), len(sites))))

    def check(self, sites: Sites) -> None:
        """Raise `ConfigError` for an unreadable trace, one that is over, or a fleet that is larger than it ever was."""
        if self.source.startswith("bamboo:") and self.source not in TRACES:
            hint = nearest(self.source, TRACES)
            raise ConfigError(f"fleet.churn.source: no trace '{self.source}'; {hint}built-in: {', '.join(TRACES)}")
        changes = read_trace(self.source)
        if not changes or self.begin_s >= changes[-1].at_s:
            end_s = changes[-1].at_s if changes else 0.0
            raise ConfigError(f"fleet.churn.begin_s: {self.begin_s:g}, but {self.source} ends after {end_s:g} s")
        most = _most(self._window())
        if len(sites) > most:
            raise ConfigError(
                f"fleet.churn.source: {self.source} has at most {most} machines at a time, and the fleet {len(sites)} "
                "workers; take fewer, or another part of the trace"
            )
        if not self._at_first():
            next_s = next(change.at_s for change in changes if change.came and change.at_s > self.begin_s)
            raise ConfigError(
                f"fleet.churn.begin_s: no machine is there {self.begin_s:g} s into {self.source}; the next one "
                f"comes at {next_s:g} s: begin then"
            )

    def _at_first(self) -> int:
        """Return how many machines are there when the run begins."""
        return sum(change.at_s <= self.begin_s for change in self._window())

    def _window(self, seed: int = 0) -> list[Change]:
        """Return the changes that are played, all with nodes. Who is there at the beginning comes at it."""
        end_s = math.inf if self.duration_s is None else self.begin_s + self.duration_s
        changes = _named(read_trace(self.source), random.Random(seed_of(seed, "trace", self.source)))
        there: dict[str | None, None] = {}  # in the order in which they came
        for change in changes:
            if change.at_s <= self.begin_s:
                if change.came:
                    there[change.node] = None
                else:
                    del there[change.node]
        later = [change for change in changes if self.begin_s < change.at_s <= end_s]
        return [Change(self.begin_s, True, node) for node in there] + later


def _named(changes: Sequence[Change], chance: random.Random) -> list[Change]:
    """Return the changes with a node each: where only counts are known, chance says which one goes."""
    named: list[Change] = []
    there: list[str] = []
    for number, change in enumerate(changes):
        if change.node is None and change.came:
            there.append(f"machine {number}")
            change = change._replace(node=there[-1])
        elif change.node is None:
            change = change._replace(node=there.pop(chance.randrange(len(there))))
        named.append(change)
    return named


def _most(window: Sequence[Change]) -> int:
    """Return how many machines are there at most."""
    return max(itertools.accumulate(1 if change.came else -1 for change in window), default=0)
