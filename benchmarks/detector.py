"""Failure detectors on the same beats: how often each is wrong, and how soon right.

Run from the repository's root (about a minute; the same figures every time):

    python -m benchmarks.detector

A peer beats every 0.5 s for 4 hours, then is silent. Columns: false suspicions per hour, and the median time from death
to suspicion, over 100 moments of dying. Kinds of beats: `regular`: 5 % of jitter; `stalls`: besides, with a chance of
1 % the peer stalls for 1 to 2 s; `slower`: half-way all intervals become three times as long, stalls too; `asleep`: it
is the observer that stands still for 20 s, once in a hundred beats, and then finds all beats at once.

    detector                             regular          stalls          slower          asleep
    phi-accrual, phi = 8            0.25  0.64 s   70.75  1.45 s   51.75  2.62 s   52.25 11.28 s
    the same, sigma >= mean / 2     0.00  1.90 s   42.50  1.97 s   21.50  5.78 s   52.00 11.28 s
    median + 8 MAD                  0.00  1.49 s   71.00  1.50 s   77.25  4.51 s   52.00  1.44 s
    Detector                        0.00  1.50 s    0.50  3.67 s    0.50  5.19 s    0.00  1.50 s
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist, median

import numpy as np

from decentral.usual import usual_most
from decentral.workers.detector import Detector

INTERVAL_S = 0.5
HOURS = 4.0
DEATHS = 100
"""The last so many beats are each taken for the last one of all."""


class Learned:
    """A detector that is a function of the last 1000 intervals, as the literature has them."""

    def __init__(self, timeout_s: Callable[[Sequence[float]], float]) -> None:
        self._of = timeout_s
        self._intervals = deque([INTERVAL_S] * 20, maxlen=1000)
        self._timeout_s = timeout_s(self._intervals)
        self._heard = 0.0

    def heard(self, now: float) -> None:
        self._intervals.append(now - self._heard)
        self._timeout_s, self._heard = self._of(self._intervals), now

    def suspects(self, now: float) -> bool:
        return now > self.deadline()

    def deadline(self) -> float:
        return self._heard + self._timeout_s


class Ours:
    """`Detector` with one peer."""

    def __init__(self) -> None:
        self._detector = Detector(INTERVAL_S)
        self._detector.watch([0], 0.0)

    def heard(self, now: float) -> None:
        self._detector.heard(0, now)

    def suspects(self, now: float) -> bool:
        return bool(self._detector.suspected(now))

    def deadline(self) -> float:
        return self._detector.deadline(0)


def phi_accrual(intervals: Sequence[float], phi: float = 8.0) -> float:
    """Return the silence at which phi = -log10 P(later) of a normal distribution is 8 (Hayashibara et al. 2004)."""
    return float(np.mean(intervals) - NormalDist().inv_cdf(10**-phi) * np.std(intervals))


def phi_with_floor(intervals: Sequence[float]) -> float:
    """Return the same with a standard deviation of at least half the mean."""
    mean = np.mean(intervals)
    return float(mean - NormalDist().inv_cdf(1e-8) * max(np.std(intervals), mean / 2))


def median_and_mad(intervals: Sequence[float]) -> float:
    """Return median + 8 spreads, and at least 3 medians."""
    return max(3 * median(intervals), usual_most(intervals))


DETECTORS: dict[str, Callable[[], Learned | Ours]] = {
    "phi-accrual, phi = 8": lambda: Learned(phi_accrual),
    "the same, sigma >= mean / 2": lambda: Learned(phi_with_floor),
    "median + 8 MAD": lambda: Learned(median_and_mad),
    "Detector": Ours,
}

Beats = Iterator[tuple[float, float]]
"""When a beat was sent and when the observer reads it."""


def sent(rng: random.Random, stalls: bool, slower: bool) -> Iterator[float]:
    """Yield the moments at which the peer beats."""
    now, end = 0.0, HOURS * 3600
    while now < end:
        interval = INTERVAL_S * (3 if slower and now > end / 2 else 1)
        now += max(0.0, rng.gauss(interval, 0.05 * interval))
        if stalls and rng.random() < 0.01:
            now += rng.uniform(1.0, 2.0)
        yield now


def read(rng: random.Random, beats: Iterator[float], asleep: bool) -> Iterator[tuple[float, bool]]:
    """Yield when the observer reads each beat, and whether it has slept just before."""
    awake_at = 0.0
    for beat in beats:
        sleeps = asleep and beat > awake_at and rng.random() < 0.01
        if sleeps:
            awake_at = beat + 20.0
        yield max(beat, awake_at), sleeps


def judge(detector: Learned | Ours, beats: Iterator[tuple[float, bool]]) -> tuple[float, float]:
    """Return false suspicions per hour, and the median of seconds from a last beat to the suspicion."""
    wrong, before, left_s = 0, 0.0, []
    for now, slept in beats:
        look, suspected = before, False
        while not slept and (look := look + INTERVAL_S / 2) < now:
            suspected = suspected or detector.suspects(look)
        wrong += suspected or detector.suspects(now)
        detector.heard(now)
        left_s = [*left_s[1 - DEATHS :], detector.deadline() - now]
        before = now
    return wrong / HOURS, median(left_s)


def main() -> None:
    """Print the table."""
    kinds = {
        "regular": (False, False, False),
        "stalls": (True, False, False),
        "slower": (True, True, False),
        "asleep": (False, False, True),
    }
    print(f"{'detector':<28}" + "".join(f"{kind:>16}" for kind in kinds))
    for name, make in DETECTORS.items():
        row = []
        for stalls, slower, asleep in kinds.values():
            rng = random.Random(0)
            wrong, seconds = judge(make(), read(rng, sent(rng, stalls, slower), asleep))
            row.append(f"{wrong:>8.2f} {seconds:>5.2f} s")
        print(f"{name:<28}" + "".join(f"{cell:>16}" for cell in row), flush=True)


if __name__ == "__main__":
    main()
