"""The shortest tour through all places."""

from __future__ import annotations

from collections.abc import Sequence


def shortest_tour(weights: Sequence[Sequence[float]]) -> tuple[float, tuple[int, ...]]:
    """Return the length of the shortest way from place 0 through all others and back, and the places in its order.

    `weights[i][j]` is the way from i to j. Held and Karp, 1962: the shortest ways to each place through each set of
    others, `2^n n` of them, so that a dozen places are many.
    """
    places = len(weights)
    if places == 1:
        return 0.0, (0,)
    ways: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {
        (1 << place, place): (weights[0][place], (0, place)) for place in range(1, places)
    }
    for _ in range(places - 2):
        longer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (seen, last), (length, order) in ways.items():
            for place in range(1, places):
                if not seen & 1 << place:
                    key, way = (seen | 1 << place, place), (length + weights[last][place], (*order, place))
                    longer[key] = min(way, longer.get(key, way))
        ways = longer
    return min((length + weights[last][0], order) for (_, last), (length, order) in ways.items())
