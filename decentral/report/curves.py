"""The held-out metric of a run on its way: how good it was after how many steps, samples, bytes, seconds, dollars."""

from __future__ import annotations

import dataclasses
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from decentral.accounts import Accounts, WorkerAccount
from decentral.journal import Counterfactual, Joined, Left, Record, Synced, Trained
from decentral.outcome import Outcome

MEASURES = ("steps", "samples", "bytes", "seconds", "dollars")
"""What a run uses up on its way: the evaluated worker's local steps, all others of all workers together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A held-out `value`, and what the run had used up by then.

    `dollars` are rent, and egress where its price is known; None unless the price of every machine is.
    """

    steps: int
    samples: float
    bytes: float
    seconds: float
    dollars: float | None
    value: float


@dataclass(frozen=True, slots=True)
class Curve:
    """Evaluations of the first worker, of means that nobody adopted (`looks`, by whose), and of the merged model."""

    points: tuple[Point, ...]
    looks: dict[str, tuple[Point, ...]]
    end: Point

    def to_fields(self) -> dict[str, Any]:
        """Return the curve as JSON-able fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Curve:
        """Return what `to_fields` gave."""
        looks = {whose: _points(looks) for whose, looks in fields["looks"].items()}
        return cls(_points(fields["points"]), looks, Point(**fields["end"]))


def curve_of(outcome: Outcome, headline: str) -> Curve:
    """Return the curve of the metric `headline` of a run that has trained and ended."""
    spent = _Spent(outcome.records, outcome.accounts)

    def point(seconds: float, steps: int, metrics: dict[str, float]) -> Point:
        return spent.at(seconds, steps, float(metrics[headline]))

    seen = [point(record.time_s, record.step, record.metrics) for record in outcome.evaluations()]
    looks = {
        whose: tuple(point(look.time_s, look.step, look.metrics) for look in each)
        for whose, each in looks_of(outcome.records).items()
    }
    steps = max(left.step for left in outcome.left())
    return Curve(tuple(seen), looks, point(outcome.seconds, steps, outcome.after))


def looks_of(records: Iterable[Record]) -> dict[str, list[Counterfactual]]:
    """Return the looks at means of workers, one a step, by whose these were: all workers', or each group's."""
    found: dict[int, list[Counterfactual]] = {}
    for record in records:
        if isinstance(record, Counterfactual):
            looks = found.setdefault(min(record.members), [])
            if not looks or looks[-1].step < record.step:  # all workers of a group may have looked
                looks.append(record)
    several = len(found) > 1
    return {f"group of worker {first}" if several else "mean of workers": found[first] for first in sorted(found)}


class _Spent:
    """What all workers had used up by any time.

    Samples count when their phase ends. Bytes are known when rounds end and taken to grow evenly between, as rent does:
    others may end a round a moment after the worker that evaluates.
    """

    def __init__(self, records: Iterable[Record], accounts: Accounts | None) -> None:
        samples, nbytes, rented = _Tally(), _Tally(), _Tally()
        for record in records:
            worker, now = record.worker, record.time_s
            if isinstance(record, Joined):
                samples.begin(worker, now)
                nbytes.begin(worker, now)
                rented.begin(worker, now)
            elif isinstance(record, Trained):
                samples.add(worker, now, record.samples)
            elif isinstance(record, Synced):
                nbytes.reach(worker, now, record.sent_bytes)
            elif isinstance(record, Left):
                nbytes.reach(worker, now, record.sent_bytes)
                rented.reach(worker, now, now - rented.began[worker])
        self._samples, self._bytes, self._rented = samples, nbytes, rented
        self._accounts = accounts

    def at(self, seconds: float, steps: int, value: float) -> Point:
        return Point(
            steps=steps,
            samples=self._samples.counted(seconds),
            bytes=self._bytes.total(seconds),
            seconds=seconds,
            dollars=self._dollars(seconds),
            value=value,
        )

    def _dollars(self, seconds: float) -> float | None:
        """Return rent by the time that machines were there, and egress in proportion to the bytes sent."""
        if self._accounts is None or self._accounts.dollars is None:
            return None
        return sum(self._cost(account, seconds) for account in self._accounts.workers)

    def _cost(self, account: WorkerAccount, seconds: float) -> float:
        rent, egress = account.dollars or 0.0, account.egress_dollars or 0.0
        worker = account.worker
        return rent * self._rented.share(worker, seconds) + egress * self._bytes.share(worker, seconds)


class _Tally:
    """A quantity of each worker that grows over all its stays."""

    def __init__(self) -> None:
        self.began: dict[int, float] = {}
        """When each worker's present stay began."""
        self._times: defaultdict[int, array[float]] = defaultdict(lambda: array("d"))
        self._values: defaultdict[int, array[float]] = defaultdict(lambda: array("d"))
        self._before: dict[int, float] = {}

    def begin(self, worker: int, now: float) -> None:
        """A stay begins: what `reach` is told from now on is of this one alone."""
        self.began[worker] = now
        self._before[worker] = self._last(worker)
        self._note(worker, now, self._before[worker])

    def add(self, worker: int, now: float, amount: float) -> None:
        self._note(worker, now, self._last(worker) + amount)

    def reach(self, worker: int, now: float, value: float) -> None:
        self._note(worker, now, self._before[worker] + value)

    def counted(self, now: float) -> float:
        """Return how much had been noted by then, over all workers."""
        found = 0.0
        for worker, times in self._times.items():
            place = bisect_right(times, now)
            found += self._values[worker][place - 1] if place else 0.0
        return found

    def total(self, now: float) -> float:
        """Return how much it was by then, over all workers."""
        return float(sum(np.interp(now, self._times[worker], self._values[worker]) for worker in self._times))

    def share(self, worker: int, now: float) -> float:
        """Return the part of what it came to for the worker in the end, 0 to 1."""
        whole = self._last(worker)
        return float(np.interp(now, self._times[worker], self._values[worker])) / whole if whole else 0.0

    def _last(self, worker: int) -> float:
        return self._values[worker][-1] if self._values[worker] else 0.0

    def _note(self, worker: int, now: float, value: float) -> None:
        self._times[worker].append(now)
        self._values[worker].append(value)


def _points(fields: Iterable[dict[str, Any]]) -> tuple[Point, ...]:
    return tuple(Point(**each) for each in fields)
