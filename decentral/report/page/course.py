"""How far a run was, and how it did, along each of the axes that a page can be read by."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import accumulate
from math import isfinite, sqrt
from typing import NamedTuple

import numpy as np

from decentral.fleet.units import HOUR_S
from decentral.report.page.folders import ReadRun
from decentral.report.page.history import Look


class Place(NamedTuple):
    """How far all workers together were: samples trained on, seconds into the run, bytes sent, dollars if priced."""

    samples: float
    time: float
    bytes: float
    dollars: float | None


class Held(NamedTuple):
    """A held-out value of the headline metric."""

    place: Place
    value: float
    worker: int
    step: int


class Losses(NamedTuple):
    """The training losses of one bin of time: mean and standard deviation over the local steps, and how many."""

    place: Place
    mean: float
    deviation: float
    steps: float


class Course:
    """What the charts of one run are drawn from."""

    def __init__(self, read: ReadRun) -> None:
        self.read = read
        self._cost = _Cost(read)
        history = read.history
        self.edges = _edges(history.end_s, history.bins.width_s)
        self.held = [self._held(look) for look in history.looks.values() if read.headline in look.metrics]
        self.means = [self._held(look) for look in history.means.values() if read.headline in look.metrics]
        self.losses = self._losses()
        self.apart = [each for each in history.apart() if isfinite(each.distance)]
        self.end = self._place(history.samples, history.end_s, history.sent_bytes)

    @property
    def priced(self) -> bool:
        """Whether the dollars of every place are known."""
        return self.end.dollars is not None

    @property
    def cost_is(self) -> str:
        """What the dollars are those of."""
        return "machines and egress" if self._cost.egress is not None else "machines alone"

    def per_bin(self, key: Hashable) -> list[float]:
        """Return a quantity's sums, one for each bin between two `edges`."""
        bins = self.read.history.bins
        count = max(0, len(self.edges) - 1)
        sums = bins.sums(key, count + 1)
        return [*sums[: count - 1], sum(sums[count - 1 :])] if count else []

    def columns(self, most: int) -> list[float]:
        """Return the edges of at most so many columns, each as many neighbouring bins; the last one may be fewer."""
        return [*self.edges[: -1 : self._together(most)], *self.edges[-1:]]

    def per_column(self, key: Hashable, most: int) -> list[float]:
        """Return a quantity's sums, one for each of these columns."""
        each, fine = self._together(most), self.per_bin(key)
        return [sum(fine[place : place + each]) for place in range(0, len(fine), each)]

    def _together(self, most: int) -> int:
        return max(1, -(-(len(self.edges) - 1) // most))

    def _losses(self) -> list[Losses]:
        steps, loss, squares = self.per_bin("steps"), self.per_bin("loss"), self.per_bin("squares")
        samples, sent = accumulate(self.per_bin("samples")), accumulate(self.per_bin("sent"))
        found = []
        for until, count, total, square, by_then, gone in zip(
            self.edges[1:], steps, loss, squares, samples, sent, strict=True
        ):
            if count:
                mean = total / count
                deviation = sqrt(max(0.0, square / count - mean**2))
                found.append(Losses(self._place(by_then, until, gone), mean, deviation, count))
        return found

    def _held(self, look: Look) -> Held:
        place = self._place(look.samples, look.time_s, look.sent_bytes)
        return Held(place, float(look.metrics[self.read.headline]), look.worker, look.step)

    def _place(self, samples: float, time_s: float, sent_bytes: float) -> Place:
        return Place(samples, time_s, sent_bytes, self._cost.until(time_s, sent_bytes))


class _Cost:
    """What a run has cost by any time: rent by the second, egress in proportion to the bytes sent."""

    def __init__(self, read: ReadRun) -> None:
        history, groups = read.history, read.run.fleet.each() if read.run else []
        self.egress: float | None = read.accounts.get("egress_dollars")
        self._sent = history.sent_bytes
        changes: list[tuple[float, float]] = []
        self._known = bool(history.workers)
        for number, worker in history.workers.items():
            price = groups[number].price if number < len(groups) else None
            if price is None:
                self._known = False
                break
            for stay in worker.presence(history.end_s):
                changes += [(stay.since_s, price / HOUR_S), (stay.until_s, -price / HOUR_S)]
        self._times, self._dollars = [0.0], [0.0]
        rate = 0.0
        for time_s, change in sorted(changes):
            self._dollars.append(self._dollars[-1] + rate * (time_s - self._times[-1]))
            self._times.append(time_s)
            rate += change

    def until(self, time_s: float, sent_bytes: float) -> float | None:
        if not self._known:
            return None
        share = sent_bytes / self._sent if self._sent else 0.0
        return float(np.interp(time_s, self._times, self._dollars)) + (self.egress or 0.0) * share


def _edges(end_s: float, width_s: float) -> list[float]:
    """Return the edges of the bins up to the end; what is left over of less than half a bin is one with the last."""
    if end_s <= 0:
        return []
    whole = int(end_s / width_s)
    if whole and end_s - whole * width_s < 0.5 * width_s:
        whole -= 1
    return [place * width_s for place in range(whole + 1)] + [end_s]
