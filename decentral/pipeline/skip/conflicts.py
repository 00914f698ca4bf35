"""Where the routes of microbatches get into each other's way, and what would get one of them out of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from decentral.pipeline.skip.replay import Visit
from decentral.pipeline.skip.routes import Limits, Route

Remedy = tuple[int, Limits]
"""Which microbatch gives way, and its limits from then on."""


def crowded(routes: Sequence[Route], limits: Sequence[Limits], groups: Mapping[tuple[int, ...], int]) -> list[Remedy]:
    """Return how to relieve the most overloaded group of nodes; none if no group is visited more often than it may.

    One remedy for each of its visitors, which then keeps away from the whole group. Groups are stages (CC3) or single
    nodes (TC1), each with how many microbatches may visit it.
    """
    loads = Counter(node for route in routes for node in route.path)
    excess = {group: sum(loads[node] for node in group) - most for group, most in groups.items()}
    worst = max(excess, key=lambda group: excess[group])
    if excess[worst] <= 0:
        return []
    visitors = [index for index, route in enumerate(routes) if not set(worst).isdisjoint(route.path)]
    return [(index, limits[index].without(worst)) for index in visitors]


def colliding(routes: Sequence[Route], limits: Sequence[Limits]) -> list[Remedy]:
    """Return how to part the first two visits that are at a node at the same time; none if there are no such (TC2).

    Of two forward passes either may yield; otherwise the later one does. Two backward passes may be at a node at the
    same time, as in SkipPipe's code: which of them waits then is for the replay to find.
    """
    at: dict[int, list[tuple[int, Visit]]] = {}
    for index, route in enumerate(routes):
        for visit in route.visits:
            at.setdefault(visit.node, []).append((index, visit))
    firsts = [next(_collisions(visits), None) for visits in at.values()]
    found = [each for each in firsts if each is not None]
    if not found:
        return []
    (one, earlier), (other, later) = min(found, key=lambda each: each[1][1].start_s)
    remedies = [(other, limits[other].avoiding(earlier))]
    if earlier.kind == later.kind:
        remedies.append((one, limits[one].avoiding(later)))
    return remedies


def _collisions(visits: list[tuple[int, Visit]]) -> Iterator[tuple[tuple[int, Visit], tuple[int, Visit]]]:
    """Yield two visits of a node that overlap, the earlier one first, in ascending order of the later one's start."""
    visits = sorted(visits, key=lambda each: (each[1].start_s, each[0]))
    for place, (index, later) in enumerate(visits):
        for other, earlier in visits[:place]:
            if earlier.end_s > later.start_s and other != index and "forward" in (earlier.kind, later.kind):
                yield (other, earlier), (index, later)
