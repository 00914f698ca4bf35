"""Who is slow, and why: compute, storage or link. Pure: what was measured of each worker goes in, verdicts come out.

The idea is C4's (Dong et al., arXiv 2406.04594): workers that do the same work are each other's measure, and rounds are
probes that are there anyway. A figure is too high if it is above 1.5 medians of the others' and above `usual_most` of
them, median + 8 spreads; so of a fleet up to half may be slow, and nobody is blamed for jitter.

- **compute**: seconds of computing that a local step takes.
- **storage**: the same, if at least half of what a step takes longer is the getting of batches.
- **link**: seconds per byte of what it sends, of what it is sent, or of both together, each the lower median over the
  workers at the other end: a thin line makes all of a worker's pairs slow, and one pair of each other worker. It is
  asked only of workers that compute as fast as the others and for `TALKING` of their time do nothing but talk: a thin
  line behind which nobody waits is none's trouble.

What it cannot tell: with two workers, which end of their link is thin; in a ring, a line that is thin one way alone;
a model whose packets are smaller than `peer.LARGE`, whose times are latency. Slow checkpoints are written beside
training and are not seen here. A fleet of which more than half is slow has no slow workers but fast ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median, median_low
from typing import Literal, NamedTuple

from decentral.usual import usual_most

Cause = Literal["compute", "storage", "link"]

SLACK = 1.5
"""Medians of the others' that a figure must exceed: where all others are equal, there is no spread to learn."""
TALKING = 0.1
"""Share of its time that a worker must do nothing but talk before its line is looked at."""


class Slow(NamedTuple):
    """The worker takes `times` as long as the others' median, because of `cause`."""

    worker: int
    cause: Cause
    times: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of a worker: seconds of computing per local step, the part of them in which it got its batches,
    the share of its time in which it only talked, and seconds per byte to each worker that it has sent to."""

    step_s: float | None = None
    loading_s: float = 0.0
    talk_share: float = 0.0
    to: Mapping[int, float] = field(default_factory=dict)


def slow_workers(measured: Mapping[int, Measured]) -> list[Slow]:
    """Return the workers that are slow compared with all others given, ascending, each with its one cause."""
    steps = {worker: each.step_s for worker, each in measured.items() if each.step_s is not None}
    found = {worker: _computing(measured, steps, worker, times) for worker, times in _too_high(steps).items()}
    sending, receiving, both = _lines(measured)
    for seconds_per_byte in (sending, receiving, both):
        for worker, times in _too_high(seconds_per_byte).items():
            if worker not in found and measured[worker].talk_share >= TALKING:
                found[worker] = Slow(worker, "link", times)
    return [found[worker] for worker in sorted(found)]


def _computing(measured: Mapping[int, Measured], steps: Mapping[int, float], worker: int, times: float) -> Slow:
    others = [other for other in steps if other != worker]
    more_s = steps[worker] - median(steps[other] for other in others)
    more_loading_s = measured[worker].loading_s - median(measured[other].loading_s for other in others)
    return Slow(worker, "storage" if more_loading_s >= more_s / 2 else "compute", times)


def _too_high(figures: Mapping[int, float]) -> dict[int, float]:
    """Return the workers whose figure is too high compared with the others', and how many of their medians it is."""
    found = {}
    for worker, figure in figures.items():
        others = [other for key, other in figures.items() if key != worker]
        if others and figure > max(SLACK * (middle := median(others)), usual_most(others)) and middle > 0:
            found[worker] = figure / middle
    return found


def _lines(measured: Mapping[int, Measured]) -> tuple[dict[int, float], dict[int, float], dict[int, float]]:
    """Return each worker's seconds per byte sending, receiving and both; of those with one pair alone, nothing."""
    pairs = {
        (source, target): seconds_per_byte
        for source, each in measured.items()
        for target, seconds_per_byte in each.to.items()
        if target in measured
    }
    sending = {worker: [value for (source, _), value in pairs.items() if source == worker] for worker in measured}
    receiving = {worker: [value for (_, target), value in pairs.items() if target == worker] for worker in measured}
    both = {worker: sending[worker] + receiving[worker] for worker in measured}
    return _middles(sending.items()), _middles(receiving.items()), _middles(both.items())


def _middles(values: Iterable[tuple[int, list[float]]]) -> dict[int, float]:
    return {worker: median_low(each) for worker, each in values if len(each) > 1}
