"""What must hold of every run, read from its records: a run that contradicts itself is not believed.

Journals of both worlds keep these promises. Only in virtual time is there one clock for all workers and no time between
two lines of code, so two of the checks, marked so, are for simulated runs alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from decentral.coverage import Tally
from decentral.errors import VerificationError
from decentral.journal import Joined, Left, Record, Synced, Trained
from decentral.traffic import Traffic

ROUNDING = 1e-9
"""Seconds, relative to the time on the clock, by which sums of many seconds may differ from the clock."""


def verify(records: Iterable[Record], traffic: Traffic | None = None) -> None:
    """Raise `VerificationError` if the records of a run that has ended contradict each other, or its traffic.

    - Time does not go back: for no worker, and in virtual time (`traffic` is given) for nobody.
    - A worker joins before it does anything, leaves after it has done everything, and once for each time it joined.
    - Its local steps follow each other without gap or overlap, each on equally many samples or missed, and what it
      leaves with is their number: every sample is accounted for once. What is missed takes no time. Who joins a run
      that goes on begins where its state was taken.
    - With leases, nobody trains on samples that it has not leased, nor settles any that it has not trained on.
    - Work takes place after the worker has joined and after the work before it, and as long as it says.
    - A round of a channel ends once for each worker that joined, and after the rounds before it.
    - In virtual time, what it did while it was there adds up to how long it was there.
    - Bytes from each worker to each other one are sent, and then either received or lost (in watched runs), and what
      the network saw of a worker is what the worker has counted itself.
    """
    for _ in verified(records, traffic):
        pass


def verified(records: Iterable[Record], traffic: Traffic | None = None) -> Iterator[Record]:
    """Yield the records of a run, each as soon as it has been verified; raises as `verify` does, maybe at the end."""
    check = _Check(virtual=traffic is not None)
    for record in records:
        check.see(record)
        yield record
    check.end()
    if traffic is not None and traffic.watched:
        _check_traffic(traffic, check.sent_bytes, check.received_bytes)


@dataclass(slots=True)
class _Worker:
    """What is known of a worker so far."""

    present: bool = False
    joined_at: float = 0.0
    last_at: float = -math.inf
    worked_until: float = 0.0
    step: int = 0
    stage: int = 0
    stays: int = 0
    trained_since_joined: bool = False
    rounds: dict[str, int] = field(default_factory=dict)  # the last of each channel


class _Check:
    def __init__(self, virtual: bool) -> None:
        self._virtual = virtual
        self._workers: dict[int, _Worker] = {}
        self._now = -math.inf
        self._batch: float | None = None
        self._tally = Tally()
        self.sent_bytes: Counter[int] = Counter()
        self.received_bytes: Counter[int] = Counter()

    def see(self, record: Record) -> None:
        worker = self._workers.get(record.worker)
        if worker is None:
            worker = self._workers[record.worker] = _Worker()
        before = self._now if self._virtual else worker.last_at
        if not record.time_s >= before:
            _fail(record, f"the clock went back: it was {before} s already")
        self._now = worker.last_at = record.time_s
        self._tally.see(record)
        if isinstance(record, Joined):
            self._joined(record, worker)
        elif not worker.present:
            _fail(record, "the worker is not in the run" + (": it has left" if worker.stays else ": it never joined"))
        elif isinstance(record, Trained):
            self._trained(record, worker)
        elif isinstance(record, Synced):
            last = worker.rounds.get(record.channel, -1)
            if record.round <= last:
                _fail(record, f"round {record.round} of '{record.channel}' ends after round {last} has")
            worker.rounds[record.channel] = record.round
        elif isinstance(record, Left):
            self._left(record, worker)

    def end(self) -> None:
        for number, worker in sorted(self._workers.items()):
            if worker.present:
                raise VerificationError(f"worker {number} joined at {worker.joined_at} s and never left")

    def _joined(self, record: Joined, worker: _Worker) -> None:
        if worker.present:
            _fail(record, f"the worker joined at {worker.joined_at} s and has not left since")
        worker.present = True
        worker.stays += 1
        worker.stage = record.stage
        worker.joined_at = worker.worked_until = record.time_s
        worker.trained_since_joined = False
        worker.rounds.clear()

    def _trained(self, record: Trained, worker: _Worker) -> None:
        first = record.step - record.steps
        # Who joins a run that goes on begins where its state was taken: later than it had come itself, or earlier.
        newcomer = not worker.trained_since_joined and (worker.stays > 1 or worker.joined_at > 0)
        if record.steps < 1 or (first != worker.step and not newcomer):
            _fail(record, f"steps {first + 1} to {record.step} do not follow step {worker.step}")
        if worker.stage == 0 and (record.samples or record.seconds):  # steps that were missed have neither
            if self._batch is None:
                self._batch = record.samples / record.steps
            if record.samples != self._batch * record.steps:
                each = f"{self._batch:g} a step"
                _fail(record, f"{record.samples} samples in {record.steps} steps, where others have {each}")
        elif record.samples:
            _fail(record, f"{record.samples} samples at stage {worker.stage}, and the first stage counts them")
        began = record.time_s - record.seconds
        slack = ROUNDING * max(1.0, record.time_s)
        if not (record.seconds >= 0 and began >= worker.worked_until - slack):
            _fail(record, f"{record.seconds} s of work cannot have begun before {worker.worked_until} s")
        worker.step, worker.worked_until, worker.trained_since_joined = record.step, record.time_s, True

    def _left(self, record: Left, worker: _Worker) -> None:
        worker.present = False
        if worker.trained_since_joined and record.step != worker.step:
            _fail(record, f"it leaves after {record.step} steps, its journal has {worker.step}")
        spent, stayed = math.fsum(record.seconds.values()), record.time_s - worker.joined_at
        if min(record.seconds.values(), default=0.0) < 0:
            _fail(record, f"negative seconds: {record.seconds}")
        if self._virtual and abs(spent - stayed) > ROUNDING * max(1.0, record.time_s):
            _fail(record, f"its accounts have {spent} s, it was there for {stayed} s")
        self.sent_bytes[record.worker] += record.sent_bytes
        self.received_bytes[record.worker] += record.received_bytes


def _check_traffic(traffic: Traffic, sent_bytes: Counter[int], received_bytes: Counter[int]) -> None:
    left: Counter[int] = Counter()
    came: Counter[int] = Counter()
    for (source, target), pair in sorted(traffic.pairs.items()):
        if pair.sent != pair.received + pair.lost:
            raise VerificationError(
                f"worker {source} sent worker {target} {pair.sent} bytes, of which {pair.received} arrived and "
                f"{pair.lost} were lost"
            )
        left[source] += pair.sent
        came[target] += pair.received
    for worker, nbytes in sorted(sent_bytes.items()):
        if left[worker] != nbytes:
            raise VerificationError(f"worker {worker} counted {nbytes} bytes sent, the network {left[worker]}")
    for worker, nbytes in sorted(received_bytes.items()):
        if came[worker] < nbytes:  # what comes for who has finished is not in its last record
            raise VerificationError(f"worker {worker} counted {nbytes} bytes received, the network {came[worker]}")


def _fail(record: Record, what: str) -> None:
    raise VerificationError(f"worker {record.worker}, '{record.kind}' at {record.time_s} s: {what}")
