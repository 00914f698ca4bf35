"""What population based training decides at a comparison: who copies whom, and which learning rates come next."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

Bounds = tuple[float, float]
"""The smallest and the largest value of a learning rate."""


def best(scores: Mapping[int, float]) -> int:
    """Return the group with the lowest score; of equal ones the first."""
    return min(scores, key=lambda group: (scores[group], group))


def donors(scores: Mapping[int, float], quantile: float, chance: random.Random) -> dict[int, int]:
    """Return whom each of the worst groups copies: one of as many best, drawn at random. Low scores are good.

    Of n groups the worst and the best are ceil(n quantile), but never more than half: no group is in both.
    """
    ranked = sorted(scores, key=lambda group: (scores[group], group))
    count = min(math.ceil(len(ranked) * quantile), len(ranked) // 2)
    return {group: chance.choice(ranked[:count]) for group in sorted(ranked[len(ranked) - count :])}


def explored(
    rates: Sequence[float],
    bounds: Sequence[Bounds | None],
    chance: random.Random,
    resample: float,
    factors: tuple[float, float],
) -> list[float]:
    """Return rates near these: each anew from its bounds with probability `resample`, else times one of two factors.

    What leaves its bounds is taken back to them; a rate without bounds stays what it is.
    """
    found = []
    for rate, bound in zip(rates, bounds, strict=True):
        if bound is None:
            found.append(rate)
        elif chance.random() < resample:
            found.append(drawn(bound, chance))
        else:
            found.append(clipped(rate * chance.choice(factors), bound))
    return found


def drawn(bounds: Bounds, chance: random.Random) -> float:
    """Return a rate between its bounds, uniform in the logarithm."""
    low, high = (math.log(bound) for bound in bounds)
    return clipped(math.exp(chance.uniform(low, high)), bounds)


def clipped(rate: float, bounds: Bounds) -> float:
    return min(max(rate, bounds[0]), bounds[1])
