"""What is usual, and what is late: learned from how long it has taken."""

from __future__ import annotations

from collections.abc import Collection
from statistics import median

SPREADS = 8.0
"""What is usual ends so many standard deviations above the median. By Cantelli's inequality at most one duration in 65
is later, whatever its distribution; of normal ones none is."""
MAD_TO_SIGMA = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation: 1 / Phi^-1(3/4)."""


def usual_most(durations: Collection[float]) -> float:
    """Return median + `SPREADS` x spread, the spread being the median absolute deviation as a standard deviation.

    Up to half of the durations may be anything and neither part follows them. Raises `ValueError` if there are none.
    """
    middle = median(durations)
    return middle + SPREADS * MAD_TO_SIGMA * median(abs(duration - middle) for duration in durations)
