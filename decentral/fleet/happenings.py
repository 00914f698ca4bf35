"""Everything that befalls a fleet's workers, in order: listed events, late starts and churn, one worker at a time."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from itertools import takewhile

from decentral.fleet.events import Event
from decentral.fleet.fleet import Fleet
from decentral.replica import seed_of


def starters(fleet: Fleet) -> frozenset[int]:
    """Return the workers who are there at the start; the others join later, or never."""
    there = fleet.churn.starters(fleet.sites()) if fleet.churn else frozenset(range(fleet.size))
    return frozenset(worker for worker, group in enumerate(fleet.each()) if worker in there and not group.start_s)


def happenings(fleet: Fleet, seed: int) -> Iterator[Event]:
    """Yield all that happens in the order of its time: events of single workers, and the coordinator's.

    The stream may be endless. An event that names several workers becomes one for each, in ascending order; who they
    are depends on the seed, on the event's place in the list and on who is there by then: whoever has been given a
    notice counts as gone. Whoever is named by number is named even if not there.
    """
    listed = sorted(enumerate(fleet.events), key=lambda pair: pair[1].at_s)
    late = [
        Event(at_s=group.start_s, kind="join", worker=worker)
        for worker, group in enumerate(fleet.each())
        if group.start_s
    ]
    churn = fleet.churn.events(fleet.sites(), seed) if fleet.churn else iter(())
    others = heapq.merge(sorted(late, key=_at_s), churn, key=_at_s)
    there: set[int | None] = set(starters(fleet))
    for place, event in heapq.merge(listed, ((-1, event) for event in others), key=lambda pair: pair[1].at_s):
        for single in _singles(event, place, fleet, seed, there):
            if single.kind in ("crash", "preempt"):
                there.discard(single.worker)
            elif single.kind == "join":
                there.add(single.worker)
            yield single


def happenings_until(fleet: Fleet, seed: int, horizon_s: float) -> tuple[Event, ...]:
    """Return what happens up to `horizon_s` seconds after the start, both ends included."""
    return tuple(takewhile(lambda event: event.at_s <= horizon_s, happenings(fleet, seed)))


def _singles(event: Event, place: int, fleet: Fleet, seed: int, there: set[int | None]) -> Iterator[Event]:
    if event.worker is not None or event.kind == "coordinator":
        yield event
        return
    sites = fleet.sites()
    able = [
        worker
        for worker in range(fleet.size)
        if event.site in (None, sites[worker]) and (worker in there) != (event.kind == "join")
    ]
    if event.count is not None and event.count < len(able):
        able = sorted(random.Random(seed_of(seed, "event", place)).sample(able, event.count))
    for worker in able:
        yield event.model_copy(update={"worker": worker, "count": None, "site": None})


def _at_s(event: Event) -> float:
    return event.at_s
