"""A timetable: when each worker ended each local phase and each round; and the records that a run with it writes."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from decentral.journal import Joined, Left, Record, Synced, Trained

Talk = Callable[[int, int], tuple[tuple[int, ...], int]]
"""`talk(worker, round)` returns the members of a worker's exchange and the bytes that it sends in it."""


BLOCK = 1 << 16
"""Records whose numbers are taken out of their arrays together."""


class Phase(NamedTuple):
    """The local phase of a round: `steps` local steps, up to `step`, the same for all workers."""

    steps: int
    step: int


class Timetable:
    """The records of a run in the order in which they came, made anew whenever somebody goes through them.

    Sixteen bytes are kept for each, a tenth of what a record takes: what it is of, and when. They may be told of in any
    order in which each worker's own stand in the order of time.
    """

    def __init__(self, workers: int, parameters: int, batch_size: int, channel: str, talk: Talk) -> None:
        self._workers, self._parameters, self._batch_size = workers, parameters, batch_size
        self._channel, self._talk = channel, talk
        self._phases: list[Phase] = []  # by round
        self._left: dict[int, Left] = {}
        # Row 2r is the end of the local phase of round r, row 2r + 1 that of the round, row 0 that of the run.
        self._places = array("q")  # row x workers + worker
        self._times = array("d")  # virtual seconds

    def trained(self, worker: int, round_: int, steps: int, step: int, now: float) -> None:
        """The worker has done `steps` local steps, up to `step`, of round `round_` (counted from 1)."""
        if round_ > len(self._phases):
            self._phases.append(Phase(steps, step))
        self._places.append(2 * round_ * self._workers + worker)
        self._times.append(now)

    def ended(self, worker: int, round_: int, now: float) -> None:
        """The round has ended for the worker."""
        self._places.append((2 * round_ + 1) * self._workers + worker)
        self._times.append(now)

    def left(self, record: Left) -> None:
        """A worker has left."""
        self._left[record.worker] = record
        self._places.append(record.worker)
        self._times.append(record.time_s)

    @property
    def seconds(self) -> float:
        """When the last worker left, in virtual seconds."""
        return max(self._times)

    def __iter__(self) -> Iterator[Record]:
        for worker in range(self._workers):
            yield Joined(time_s=0.0, worker=worker, parameters=self._parameters)
        began_at = [0.0] * self._workers
        sent_bytes = [0] * self._workers
        for row, worker, now in self._in_order():
            round_, ended = divmod(row, 2)
            if not round_:
                yield self._left[worker]
            elif ended:
                members, nbytes = self._talk(worker, round_)
                began_at[worker] = now
                sent_bytes[worker] += nbytes
                yield Synced(
                    time_s=now,
                    worker=worker,
                    channel=self._channel,
                    round=round_,
                    outcome="committed",
                    members=members,
                    sent_bytes=sent_bytes[worker],
                )
            else:
                phase = self._phases[round_ - 1]
                yield Trained(
                    time_s=now,
                    worker=worker,
                    step=phase.step,
                    steps=phase.steps,
                    samples=phase.steps * self._batch_size,
                    seconds=now - began_at[worker],
                    loss=None,
                )

    def _in_order(self) -> Iterator[tuple[int, int, float]]:
        """Yield row, worker and time of each record, in the order of time."""
        places, times = np.frombuffer(self._places, np.int64), np.frombuffer(self._times)
        order = np.argsort(times, kind="stable")
        for start in range(0, len(order), BLOCK):
            block = order[start : start + BLOCK]
            rows, workers = np.divmod(places[block], self._workers)
            yield from zip(rows.tolist(), workers.tolist(), times[block].tolist(), strict=True)
