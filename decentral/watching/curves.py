"""The curves of a run: what of its records is drawn over local steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from decentral.journal import Evaluated, Joined, Record, Synced, Trained

HELD_OUT = "held-out"
"""Who the points of held-out metrics belong to, whichever worker has evaluated."""


class Point(NamedTuple):
    """A value of the curve `name` of a worker (or of all: `HELD_OUT`) at a local step, `time_s` into the run."""

    owner: str
    name: str
    step: int
    value: float
    time_s: float


class Curves:
    """Makes points of records: each worker's loss, seconds a step, seconds a round and bytes sent; held-out metrics."""

    def __init__(self) -> None:
        self._steps: Counter[int] = Counter()
        self._since_s: dict[tuple[int, str], float] = {}  # the last round's end, by worker and channel
        self._joined_s: dict[int, float] = {}

    def points(self, record: Record) -> Iterator[Point]:
        """Yield the points that a record adds."""
        worker, owner, time_s = record.worker, f"worker {record.worker}", record.time_s
        match record:
            case Joined():
                self._joined_s[worker] = time_s
                self._since_s = {key: since for key, since in self._since_s.items() if key[0] != worker}
            case Trained():
                self._steps[worker] = record.step
                if record.loss is not None:
                    yield Point(owner, "loss", record.step, record.loss, time_s)
                if record.samples and record.seconds:
                    yield Point(owner, "step_seconds", record.step, record.seconds / record.steps, time_s)
            case Synced():
                step, key = self._steps[worker], (worker, record.channel)
                since_s = self._since_s.get(key, self._joined_s.get(worker, 0.0))
                self._since_s[key] = time_s
                yield Point(owner, f"round_seconds/{record.channel}", step, time_s - since_s, time_s)
                yield Point(owner, "sent_bytes", step, record.sent_bytes, time_s)
            case Evaluated():
                for name, value in record.metrics.items():
                    yield Point(HELD_OUT, name, record.step, value, time_s)
