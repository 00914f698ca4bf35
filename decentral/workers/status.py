"""What a run's records and members come to, as of now. Pure, and bounded in memory however long the run is.

`Tally` is fed with records, in the coordinator of a running job or from a journal, and gives the `Status` whenever it
is asked for: plain values alone, for JSON and for whoever asks over Ray.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple, TypedDict

from decentral.journal import Evaluated, Joined, Left, Metered, Record, Synced, Trained
from decentral.workers.slowness import Cause, Measured, slow_workers

RECENT = 20
"""Local phases and rounds of a worker that its medians and shares are made of."""
ENOUGH = 3
"""Measurements that must be known of a worker's steps, or of a pair's packets, before anybody is compared by them."""
ROUNDS = 10
"""Rounds of which it is kept what they came to."""


class WorkerStatus(TypedDict):
    """One worker; None: not known. `state` is "training", "joining" (a guest) or why it left.

    `shares` are those of its recent time, by what it did ("compute", "talk", "wait", "evaluate"). `slow` says why, if
    it is slow compared with the others, and `times` how much. Counters (`steps_done`, `samples`, bytes, `seconds`,
    `round_outcomes`) are of all its lives, but bytes and seconds begin anew with each.
    """

    worker: int
    state: str
    incarnation: int
    node: str | None
    step: int
    steps_done: int
    samples: int
    loss: float | None
    step_s: float | None
    round_s: float | None
    last_round_s: float | None
    shares: dict[str, float]
    seconds: dict[str, float]
    sent_bytes: int
    received_bytes: int
    round_outcomes: dict[str, int]
    heard_s: float | None
    slow: Cause | None
    times: float | None


class RoundStatus(TypedDict):
    """A round of a channel and what it came to, by those who have said so."""

    channel: str
    round: int
    outcome: str
    members: list[int]
    time_s: float


class Status(TypedDict):
    """A run as of `time_s`. `epoch` is None where only the journal is known; `held_back`: records not yet fetched."""

    run: str
    time_s: float
    over: bool
    epoch: int | None
    members: list[int]
    guests: list[int]
    departed: dict[int, str]
    metrics: dict[str, float]
    workers: list[WorkerStatus]
    rounds: list[RoundStatus]
    held_back: int


@dataclass(frozen=True, slots=True)
class Attendance:
    """What only a coordinator knows: members and guests, and of each worker its node and seconds since it was heard."""

    epoch: int
    members: tuple[int, ...]
    guests: tuple[int, ...]
    nodes: Mapping[int, str]
    heard_s: Mapping[int, float]
    held_back: int


class Tally:
    """Takes in a run's records in the order in which they come, and keeps what a `Status` needs of them."""

    def __init__(self) -> None:
        self._time_s = 0.0
        self._workers: dict[int, _Worker] = {}
        self._rounds: dict[tuple[str, int], RoundStatus] = {}
        self._metrics: dict[str, float] = {}

    def see(self, record: Record) -> None:
        """Take in a record."""
        self._time_s = max(self._time_s, record.time_s)
        worker = self._workers.get(record.worker)
        if worker is None:
            worker = self._workers[record.worker] = _Worker()
        worker.see(record)
        match record:
            case Evaluated():
                self._metrics = dict(record.metrics)
            case Synced():
                self._ended(record)

    def status(self, run: str, attendance: Attendance | None = None, time_s: float | None = None) -> Status:
        """Return the run as of now; without `attendance`, as far as records tell."""
        here = [number for number, worker in sorted(self._workers.items()) if worker.reason is None]
        measured = {number: self._workers[number].measured() for number in here}
        slow = {each.worker: each for each in slow_workers(measured)}
        workers = []
        for number, worker in sorted(self._workers.items()):
            status = worker.status(number, attendance)
            if number in slow:
                status |= {"slow": slow[number].cause, "times": slow[number].times}
            workers.append(status)
        return {
            "run": run,
            "time_s": self._time_s if time_s is None else time_s,
            "over": bool(self._workers) and not (attendance.members if attendance else here),
            "epoch": None if attendance is None else attendance.epoch,
            "members": list(attendance.members) if attendance else here,
            "guests": list(attendance.guests) if attendance else [],
            "departed": {status["worker"]: status["state"] for status in workers if status["worker"] not in here},
            "metrics": self._metrics,
            "workers": workers,
            "rounds": list(self._rounds.values()),
            "held_back": attendance.held_back if attendance else 0,
        }

    def state(self) -> dict[str, Any]:
        """Return plain values that `restore` understands."""
        return {
            "time_s": self._time_s,
            "workers": {number: worker.state() for number, worker in self._workers.items()},
            "rounds": list(self._rounds.values()),
            "metrics": self._metrics,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be what the tally was that returned this `state`."""
        self._time_s, self._metrics = state["time_s"], state["metrics"]
        self._workers = {number: _Worker.of(each) for number, each in state["workers"].items()}
        self._rounds = {(each["channel"], each["round"]): each for each in state["rounds"]}

    def _ended(self, record: Synced) -> None:
        key = record.channel, record.round
        self._rounds[key] = {
            "channel": record.channel,
            "round": record.round,
            "outcome": record.outcome,
            "members": list(record.members),
            "time_s": record.time_s,
        }
        if len(self._rounds) > ROUNDS:
            del self._rounds[next(iter(self._rounds))]


def _recent() -> deque[float]:
    return deque(maxlen=RECENT)


class _Mark(NamedTuple):
    """A worker's accounts at some moment: local steps trained on, seconds by activity, seconds getting batches."""

    steps: int
    seconds: dict[str, float]
    loading_s: float


@dataclass(slots=True)
class _Worker:
    lives: int = 0
    reason: str | None = None
    step: int = 0
    steps: int = 0
    samples: int = 0
    loss: float | None = None
    sent_bytes: int = 0
    received_bytes: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    metered: bool = False
    marks: deque[_Mark] = field(default_factory=lambda: deque(maxlen=RECENT))
    rounds_s: deque[float] = field(default_factory=_recent)
    began_s: dict[str, float] = field(default_factory=dict)
    joined_s: float = 0.0
    to: dict[int, deque[float]] = field(default_factory=dict)

    def see(self, record: Record) -> None:
        match record:
            case Joined():
                self._join(record)
            case Trained():
                self._train(record)
            case Synced():
                self.outcomes[record.outcome] += 1
                self.sent_bytes = record.sent_bytes
                self.rounds_s.append(record.time_s - self.began_s.get(record.channel, self.joined_s))
                self.began_s[record.channel] = record.time_s
            case Metered():
                self._meter(record)
            case Left():
                self.reason, self.step, self.seconds = record.reason, record.step, dict(record.seconds)
                self.sent_bytes, self.received_bytes = record.sent_bytes, record.received_bytes

    def state(self) -> dict[str, Any]:
        """Return plain values that `of` understands."""
        to = {target: list(seconds) for target, seconds in self.to.items()}
        queues = {"marks": list(self.marks), "rounds_s": list(self.rounds_s), "to": to}
        return {**{each.name: getattr(self, each.name) for each in fields(self)}, **queues}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> _Worker:
        """Return the worker that returned this `state`."""
        worker = cls(**{**state, "outcomes": Counter(state["outcomes"])})
        worker.marks = deque((_Mark(*mark) for mark in state["marks"]), maxlen=RECENT)
        worker.rounds_s = deque(state["rounds_s"], maxlen=RECENT)
        worker.to = {target: deque(seconds, maxlen=RECENT) for target, seconds in state["to"].items()}
        return worker

    def measured(self) -> Measured:
        """Return what others are compared with."""
        return Measured(
            step_s=self._step_s(),
            loading_s=self._of_steps([mark.loading_s for mark in self.marks]) or 0.0,
            talk_share=self._shares().get("talk", 0.0),
            to={target: median(seconds) for target, seconds in self.to.items() if len(seconds) >= ENOUGH},
        )

    def status(self, worker: int, attendance: Attendance | None) -> WorkerStatus:
        guest = attendance is not None and worker in attendance.guests
        return {
            "worker": worker,
            "state": self.reason or ("joining" if guest else "training"),
            "incarnation": max(0, self.lives - 1),
            "node": attendance.nodes.get(worker) if attendance else None,
            "step": self.step,
            "steps_done": self.steps,
            "samples": self.samples,
            "loss": self.loss,
            "step_s": self._step_s(),
            "round_s": median(self.rounds_s) if self.rounds_s else None,
            "last_round_s": self.rounds_s[-1] if self.rounds_s else None,
            "shares": self._shares(),
            "seconds": dict(self.seconds),
            "sent_bytes": self.sent_bytes,
            "received_bytes": self.received_bytes,
            "round_outcomes": dict(self.outcomes),
            "heard_s": attendance.heard_s.get(worker) if attendance else None,
            "slow": None,
            "times": None,
        }

    def _join(self, record: Joined) -> None:
        """Begin a life: whatever is measured is measured anew."""
        self.lives += 1
        self.reason, self.joined_s = None, record.time_s
        self.seconds.clear()
        self.marks.clear()
        self.rounds_s.clear()
        self.began_s.clear()
        self.to.clear()

    def _train(self, record: Trained) -> None:
        self.step = record.step
        if not record.samples:
            return  # these steps were missed
        self.steps += record.steps
        self.samples += record.samples
        self.loss = self.loss if record.loss is None else record.loss
        if not self.metered and record.seconds:
            self.seconds["compute"] = self.seconds.get("compute", 0.0) + record.seconds
            self.marks.append(_Mark(self.steps, dict(self.seconds), 0.0))

    def _meter(self, record: Metered) -> None:
        """Go by the worker's own accounts, which tell talking from waiting, and not by its phases any more."""
        if not self.metered:
            self.metered = True
            self.marks.clear()
        self.seconds, self.received_bytes = dict(record.seconds), record.received_bytes
        self.marks.append(_Mark(self.steps, dict(record.seconds), record.loading_s))
        for target, nbytes, seconds in record.sent:
            if nbytes:
                self.to.setdefault(target, _recent()).append(seconds / nbytes)

    def _step_s(self) -> float | None:
        return self._of_steps([mark.seconds.get("compute", 0.0) for mark in self.marks])

    def _of_steps(self, totals: list[float]) -> float | None:
        """Return the median of what a local step adds to these totals, one at each mark; None: not enough is known."""
        pieces = [
            (after - before) / (second.steps - first.steps)
            for (first, second), (before, after) in zip(pairwise(self.marks), pairwise(totals), strict=True)
            if second.steps > first.steps
        ]
        return median(pieces) if len(pieces) >= ENOUGH else None

    def _shares(self) -> dict[str, float]:
        """Return each activity's share of the time between the first and the last mark; none without accounts."""
        if not self.metered or len(self.marks) < 2:
            return {}
        first, last = self.marks[0].seconds, self.marks[-1].seconds
        spent = {activity: seconds - first.get(activity, 0.0) for activity, seconds in last.items()}
        total = sum(spent.values())
        return {activity: seconds / total for activity, seconds in spent.items()} if total else {}
