"""What CheckFree's authors report: hours of a model of 500 million parameters to a validation loss of 2.85."""

from __future__ import annotations

from examples.stage_loss.runs import CHECKPOINTS, COMPUTATION, PLUS

HOURS = {
    CHECKPOINTS: {0.05: 558.23, 0.10: 621.67, 0.16: 634.35},
    COMPUTATION: {0.05: 419.56, 0.10: 419.56, 0.16: 419.56},
    "checkfree": {0.05: 367.81, 0.10: 405.87, 0.16: 562.96},
    PLUS: {0.05: 355.13, 0.10: 367.81, 0.16: 460.6},
}
"""By way to recover and probability that a stage is lost within an hour (Blagoev et al., arXiv 2506.15461)."""
ONE = "checkfree", 0.05
"""What hours are compared to, the paper's as well as ours."""


def relative_hours(way: str, rate: float) -> float | None:
    """Return the paper's hours relative to those of `ONE`; None where it has none."""
    hours = HOURS.get(way, {}).get(rate)
    return None if hours is None else hours / HOURS[ONE[0]][ONE[1]]
