"""How long to wait, learned from how long it has taken. No clock is read here: both worlds use it alike."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from statistics import median

SPREADS = 8.0
"""Deadlines are so many standard deviations above the median. By Cantelli's inequality at most one duration in 65 is
later, whatever its distribution; of normal ones none is."""
MAD_TO_SIGMA = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation: 1 / Phi^-1(3/4)."""


def usual_most(durations: Collection[float]) -> float:
    """Return median + `SPREADS` x spread, the spread being the median absolute deviation as a standard deviation.

    Up to half of the durations may be anything and neither part follows them. Raises `ValueError` if there are none.
    """
    middle = median(durations)
    return middle + SPREADS * MAD_TO_SIGMA * median(abs(duration - middle) for duration in durations)


class AdaptiveDeadline:
    """How long to wait for what comes again and again: a round's last packet, or one member's.

    Feed it with one series of durations in seconds. Members of very different speed are different series: keep a
    deadline for each, and wait for the longest of those that are in the run. `most_s` is the deadline until enough is
    known, and no later one is longer; `floor_s`, above 0, no later one is shorter: take a few round trips of the
    slowest link.

    In between it is the larger of 1.5 medians and `usual_most` of the last 50 durations. Who has slowed down would be
    late for ever, and its new pace never seen: as TCP does with its retransmission timer, every miss doubles the
    deadline, and it comes down only as durations fit without (Karn and Partridge 1987).
    """

    SEEN = 50
    """Durations that count: old ones tell of another fleet."""
    ENOUGH = 5
    """Durations that must be known before the deadline is learned from them."""
    SLACK = 1.5
    """Medians that the deadline is at least: where every round takes exactly as long, there is no spread to learn."""

    def __init__(self, most_s: float, floor_s: float) -> None:
        if not 0 < floor_s <= most_s:
            raise ValueError(f"floor_s must be above 0 and at most most_s = {most_s:g}; got {floor_s:g}")
        self._most_s, self._floor_s = most_s, floor_s
        self._durations: deque[float] = deque(maxlen=self.SEEN)
        self._backoff = 1.0

    def observe(self, seconds: float) -> None:
        """It came after so many seconds."""
        if len(self._durations) >= self.ENOUGH and seconds <= self._learned_s():
            self._backoff = max(1.0, self._backoff / 2)
        self._durations.append(seconds)

    def missed(self) -> None:
        """The deadline passed and it had not come."""
        if self.deadline() < self._most_s:
            self._backoff *= 2

    def deadline(self) -> float:
        """Return how many seconds to wait for the next one."""
        if len(self._durations) < self.ENOUGH:
            return self._most_s
        return min(self._most_s, self._backoff * self._learned_s())

    def _learned_s(self) -> float:
        return max(self._floor_s, self.SLACK * median(self._durations), usual_most(self._durations))
