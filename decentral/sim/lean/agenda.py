"""An agenda: what happens when, in virtual time, and no more than that."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

EARLY = -(1 << 62)
"""Added to an event's number, so that it comes before all others of its instant."""


class Agenda:
    """Events in order of time; those of one instant in the order in which they were added, the early ones first.

    `now` is the virtual time in seconds; read it, do not write it.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._added = 0
        self._events: list[tuple[float, int, Callable[[Any], object], Any]] = []

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self.now

    def add(self, when: float, do: Callable[[Any], object], what: Any) -> None:
        """Have `do(what)` called at virtual time `when`."""
        self._added = number = self._added + 1
        heappush(self._events, (when, number, do, what))

    def add_early(self, when: float, do: Callable[[Any], object], what: Any) -> None:
        """Have `do(what)` called at virtual time `when`, before what is added by `add` for that time."""
        self._added = number = self._added + 1
        heappush(self._events, (when, EARLY + number, do, what))

    def do_at(self, when: float, do: Callable[[Any], object], what: Any) -> None:
        """Call `do(what)` here and now as of virtual time `when`.

        Of a time that has passed, what follows from it up to now happens as well; of one to come, nothing else may have
        any bearing on it.
        """
        now, self.now = self.now, when
        do(what)
        events = self._events
        while events and events[0][0] < now:
            self.now, _, do, what = heappop(events)
            do(what)
        self.now = now

    def run(self) -> None:
        """Let everything happen."""
        events = self._events
        while events:
            self.now, _, do, what = heappop(events)
            do(what)
