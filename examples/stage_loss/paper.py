"""What CheckFree's authors report: hours of a model of 500 million parameters to a validation loss of 2.85."""

from __future__ import annotations

import math

from decentral.fleet.units import HOUR_S
from examples.stage_loss.runs import CHECKPOINTS, COMPUTATION, PLUS

HOURS = {
    CHECKPOINTS: {0.05: 558.23, 0.10: 621.67, 0.16: 634.35},
    COMPUTATION: {0.05: 419.56, 0.10: 419.56, 0.16: 419.56},
    "checkfree": {0.05: 367.81, 0.10: 405.87, 0.16: 562.96},
    PLUS: {0.05: 355.13, 0.10: 367.81, 0.16: 460.6},
}
"""By way to recover and probability that a stage is lost within an hour (Blagoev et al., arXiv 2506.15461)."""
ITERATION_S = {
    COMPUTATION: {0.05: 151.04, 0.10: 151.04, 0.16: 151.04},
    "checkfree": {0.05: 91.32, 0.10: 91.32, 0.16: 92.12},
    PLUS: {0.05: 91.32, 0.10: 91.32, 0.16: 92.12},
}
"""Seconds that an iteration takes there."""
ONE = "checkfree", 0.05
"""What hours are compared to, the paper's as well as ours."""


def relative_hours(way: str, rate: float) -> float | None:
    """Return the paper's hours relative to those of `ONE`; None where it has none."""
    hours = HOURS.get(way, {}).get(rate)
    return None if hours is None else hours / HOURS[ONE[0]][ONE[1]]


def relative_iterations(way: str, rate: float) -> float | None:
    """Return the paper's iterations relative to those of redundant computation, which none of them comes to nothing."""
    if rate not in ITERATION_S.get(way, {}):
        return None
    return _iterations(way, rate) / _iterations(COMPUTATION, rate)


def losses(way: str, rate: float, stages: int) -> float | None:
    """Return how many losses of so many stages the paper's rate and hours lead to; None where it has no hours."""
    hours = HOURS.get(way, {}).get(rate)
    return None if hours is None else -math.log1p(-rate) * hours * stages


def _iterations(way: str, rate: float) -> float:
    return HOURS[way][rate] * HOUR_S / ITERATION_S[way][rate]
