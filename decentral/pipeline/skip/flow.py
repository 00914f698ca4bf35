"""The largest flow through a network."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

Place = TypeVar("Place", bound=Hashable)


def largest_flow(capacity: dict[Place, dict[Place, int]], source: Place, sink: Place) -> int:
    """Return how much can flow from source to sink; `capacity[a][b]` of it directly from a to b.

    Ford and Fulkerson's augmenting paths, one unit at a time, so that the work grows with the flow. `capacity` is left
    with what has not been used, and gets an entry for every way back.
    """
    flow = 0
    while _push(capacity, source, sink, {source}):
        flow += 1
    return flow


def _push(capacity: dict[Place, dict[Place, int]], at: Place, sink: Place, seen: set[Place]) -> bool:
    """Push one unit on from a place to the sink if there is a way past places not yet seen; say whether there was."""
    if at == sink:
        return True
    for to, spare in capacity.setdefault(at, {}).items():
        if spare and to not in seen:
            seen.add(to)
            if _push(capacity, to, sink, seen):
                capacity[at][to] -= 1
                back = capacity.setdefault(to, {})
                back[at] = back.get(at, 0) + 1
                return True
    return False
