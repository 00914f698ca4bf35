"""What a few seeds tell of all seeds: means with Student's t-intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds; the interval mean +- `margin` covers the true mean in 95 % of cases. None: one seed alone."""

    mean: float
    margin: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of the values and its margin t * s / sqrt(n), for values that are about normal.

    Five seeds are too few for a bootstrap, whose intervals come out too narrow then. Raises `ValueError` for none.
    """
    if not values:
        raise ValueError("the mean of no values")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, None)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return Estimate(mean, t_quantile(len(values) - 1) * deviation / math.sqrt(len(values)))


def paired(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Return the estimate of value - baseline over the same seeds: what seeds have in common falls out.

    Raises `ValueError` unless there are as many of each, and at least one.
    """
    return estimate([value - base for value, base in zip(values, baseline, strict=True)])


@cache
def t_quantile(freedom: int) -> float:
    """Return t with P(|T| <= t) = 95 % under Student's distribution of so many degrees of freedom.

    With t = sqrt(freedom) tan(angle) the density is cos(angle)^(freedom - 1), up to a factor.
    """
    angles = np.linspace(0.0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(np.interp(CONFIDENCE * mass[-1], mass, angles))
