"""What workers have reported: the records that the driver has not taken yet, and what all of them come to."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from decentral.journal import Joined, Left, Record, Synced, Trained, record_from
from decentral.workers.status import Tally

Fields = dict[str, Any]


class Reports:
    """Records as they come, each worker's in order. `lines`: how many of the journal each worker had before the run."""

    def __init__(self, lines: Mapping[int, int]) -> None:
        self.tally = Tally()
        self.held: list[Fields] = []
        """Those that the driver has not taken, in their order."""
        self.taken = 0
        """How many it has taken."""
        self.lines = Counter(lines)
        """Of the journal, by worker."""
        self.lines_before: dict[int, int] = {}
        """Of the journal, by worker, before its present life."""
        self._taken_lines = Counter(lines)
        self._took = asyncio.Event()
        self._known: Counter[int] = Counter()  # records of each worker's present life
        self._lives: defaultdict[int, _Life] = defaultdict(_Life)

    def begin_life(self, worker: int) -> None:
        """The worker reports from the beginning."""
        self._known[worker] = 0
        self.lines_before[worker] = self.lines[worker]

    def unknown(self, worker: int, first: int, records: Sequence[Fields]) -> Sequence[Fields]:
        """Return which of these records, the worker's `first`-th and following, have not been reported before."""
        return records[max(0, self._known[worker] - first) :]

    def take(self, worker: int, records: Sequence[Record]) -> None:
        """Take in what the worker has reported."""
        self._known[worker] += len(records)
        self.keep(worker, records)

    def keep(self, worker: int, records: Sequence[Record]) -> None:
        """Keep records of the worker's, whoever has written them."""
        self.lines[worker] += len(records)
        self.held += [plain(record) for record in records]
        for record in records:
            self._lives[worker].see(record)
            self.tally.see(record)

    def last_record(self, worker: int, time_s: float, reason: str) -> Left | None:
        """Return the record with which the worker's life ends, if it cannot write it; None if it has."""
        life = self._lives[worker]
        return life.last_record(worker, time_s, reason) if life.is_on else None

    def forget(self, taken: int) -> None:
        """The driver has so many records in all: these are kept no longer."""
        gone = taken - self.taken
        self._taken_lines.update(fields["worker"] for fields in self.held[:gone])
        del self.held[:gone]
        self.taken = taken
        self._took.set()
        self._took = asyncio.Event()

    async def journalled(self, lines: Mapping[int, int]) -> None:
        """Return when the driver has so many lines of the journal of each worker."""
        while any(self._taken_lines[worker] < count for worker, count in lines.items()):
            await self._took.wait()

    def state(self) -> Fields:
        """Return plain values that `restore` understands."""
        return {
            "tally": self.tally.state(),
            "held": self.held,
            "taken": self.taken,
            "lines": self.lines,
            "lines_before": self.lines_before,
            "taken_lines": self._taken_lines,
            "known": self._known,
            "lives": {worker: dataclasses.astuple(life) for worker, life in self._lives.items()},
        }

    def restore(self, state: Fields) -> None:
        """Be what those were that returned this `state`, before anything is reported."""
        self.tally.restore(state["tally"])
        self.held = [plain(record_from(fields)) for fields in state["held"]]
        self.taken = state["taken"]
        self.lines, self.lines_before = Counter(state["lines"]), state["lines_before"]
        self._taken_lines, self._known = Counter(state["taken_lines"]), Counter(state["known"])
        self._lives.update({worker: _Life(*values) for worker, values in state["lives"].items()})


@dataclasses.dataclass(slots=True)
class _Life:
    """What the records of a worker's present life come to so far."""

    is_on: bool = False
    step: int = 0
    sent_bytes: int = 0
    compute_s: float = 0.0

    def see(self, record: Record) -> None:
        if isinstance(record, Joined):
            self.is_on = True
            self.step = self.sent_bytes = 0
            self.compute_s = 0.0
        elif isinstance(record, Left):
            self.is_on = False
        elif isinstance(record, Trained):
            self.step = record.step
            self.compute_s += record.seconds
        elif isinstance(record, Synced):
            self.sent_bytes = record.sent_bytes

    def last_record(self, worker: int, time_s: float, reason: str) -> Left:
        return Left(
            time_s=time_s,
            worker=worker,
            reason=reason,
            step=self.step,
            seconds={"compute": self.compute_s, "talk": 0.0, "wait": 0.0, "evaluate": 0.0},
            sent_bytes=self.sent_bytes,
            received_bytes=0,
            messages_sent=0,
        )


def plain(record: Record) -> Fields:
    """Return the record's fields as they are: `asdict` would copy them, and a replay is mostly this."""
    return {"kind": record.kind, **{field.name: getattr(record, field.name) for field in dataclasses.fields(record)}}
