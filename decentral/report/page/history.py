"""What a page says of a run, taken from its journal in one pass and in bounded memory.

Sums over time are kept in `Bins`, workers in counters, and of what comes in any number the first or every n-th.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite
from typing import Generic, Literal, NamedTuple, TypeVar

from decentral.accounts import TO_THE_END
from decentral.coverage import Coverage, Tally
from decentral.errors import VerificationError
from decentral.journal import (
    Counterfactual,
    Evaluated,
    Joined,
    Left,
    Metered,
    Rebuilt,
    Record,
    Refused,
    Restored,
    Sketched,
    Spent,
    Synced,
    Trained,
)
from decentral.report.page.bins import Bins
from decentral.sketch import Sketches, distance

ROWS = 64
"""Rows of a timeline at most; where there are more workers, neighbours share a row."""

KEPT = 200
"""Events, unsettled rounds and kinds of refusals that are listed one by one."""

OPEN = 16
"""Evaluations of which sketches may still come; workers that are farther behind than that are left out."""

OUTCOMES = ("committed", "degraded", "skipped")
"""What rounds come to, from the best on; a rule of somebody's own may know others."""

Source = Literal["spent", "metered", "trained", "accounts"]
"""Who says what a worker did when, from the closest to the farthest look; see `History.source`."""

T = TypeVar("T")


class Thinned(Generic[T]):
    """A sequence of which every n-th is kept, n as small as `limit` allows; the last one is there in any case."""

    def __init__(self, limit: int = 2000) -> None:
        self._limit, self._stride, self._kept = limit, 1, list[T]()
        self._last: T | None = None
        self.seen = 0

    def append(self, value: T) -> None:
        if self.seen % self._stride == 0:
            self._kept.append(value)
            if len(self._kept) > self._limit:
                del self._kept[1::2]
                self._stride *= 2
        self._last = value
        self.seen += 1

    def values(self) -> list[T]:
        """Return what was kept, in order."""
        if self._last is None or self._kept[-1] is self._last:
            return list(self._kept)
        return [*self._kept, self._last]


class Look(NamedTuple):
    """Held-out metrics, and how far the run was: samples trained on and bytes sent by all workers until then."""

    time_s: float
    samples: int
    sent_bytes: int
    worker: int
    step: int
    metrics: dict[str, float]


class Apart(NamedTuple):
    """How far replicas were apart, by the norm of their mean, before they met."""

    time_s: float
    distance: float


@dataclass(slots=True)
class _Meeting:
    """Sketches of the same evaluation, by stage, and when the last of them came."""

    time_s: float = 0.0
    stages: defaultdict[int, Sketches] = field(default_factory=lambda: defaultdict(Sketches))


class Stay(NamedTuple):
    """A time for which a worker was in the run; `reason` is why it left, None if the journal ends before that."""

    since_s: float
    until_s: float
    reason: str | None


class Happening(NamedTuple):
    """Something out of the ordinary that befell a worker, in words."""

    time_s: float
    worker: int
    what: str


class Unsettled(NamedTuple):
    """A round that was not simply committed, and who was in it."""

    time_s: float
    channel: str
    round: int
    outcome: str
    members: tuple[int, ...]


@dataclass(slots=True)
class WorkerHistory:
    """One worker, over all its stays."""

    stays: list[Stay] = field(default_factory=list)
    present_since: float | None = None
    stage: int = 0
    step: int = 0
    steps: int = 0
    samples: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By activity, of the stays that are over and of the present one as far as it has told."""
    earlier_sent: int = 0
    earlier_received: int = 0
    sent: int = 0
    received: int = 0
    told: dict[str, float] = field(default_factory=dict)
    told_at: float = 0.0

    @property
    def sent_bytes(self) -> int:
        return self.earlier_sent + self.sent

    @property
    def received_bytes(self) -> int:
        return self.earlier_received + self.received

    @property
    def reason(self) -> str | None:
        """Why it left last; None while it is there."""
        return None if self.present_since is not None or not self.stays else self.stays[-1].reason

    def down_s(self, end_s: float) -> float:
        """Return for how many seconds it was away against its will, between its first coming and the run's end."""
        return sum(until - since for since, until in self.absences(end_s))

    def absences(self, end_s: float) -> list[tuple[float, float]]:
        """Return from when till when it was away after it had been lost."""
        if not self.stays:
            return []
        nexts = [stay.since_s for stay in self.stays[1:]]
        nexts.append(end_s if self.present_since is None else self.present_since)
        return [
            (stay.until_s, since)
            for stay, since in zip(self.stays, nexts, strict=True)
            if stay.reason not in TO_THE_END and since > stay.until_s
        ]

    def presence(self, end_s: float) -> list[Stay]:
        """Return its stays, a present one up to the end of the journal."""
        now = [] if self.present_since is None else [Stay(self.present_since, end_s, None)]
        return [*self.stays, *now]


class History:
    """Takes in the records of a run, in the order of its journal.

    `workers`: how many the run file has, by which those of a large fleet share rows of the timeline; 0: unknown.
    """

    def __init__(self, workers: int = 0) -> None:
        self.records = 0
        self.end_s = 0.0
        self.parameters = 0
        self.bins = Bins()
        self.workers: dict[int, WorkerHistory] = {}
        self.looks: Thinned[Look] = Thinned()
        self.means: Thinned[Look] = Thinned()
        self._meetings: dict[int, _Meeting] = {}
        self._apart: Thinned[Apart] = Thinned()
        self._met = 0
        self.happenings: list[Happening] = []
        self.happened = 0
        self.rounds: Counter[tuple[str, str]] = Counter()
        """Rounds of each worker, by channel and what they came to."""
        self.unsettled: dict[tuple[str, int, str, tuple[int, ...]], Unsettled] = {}
        self.refused: Counter[tuple[int, int, str]] = Counter()
        """By who refused, whose it was, and why."""
        self.not_finite = 0
        """Local phases whose loss, or its square, was not a finite number."""
        self.contradiction = ""
        """What is wrong with the leases that the journal tells of; empty if nothing is."""
        self.workers_a_row = max(1, -(-workers // ROWS))
        self._samples = self._sent = 0
        self._sources: set[Source] = set()
        self._tally = Tally()

    @property
    def all_finished(self) -> bool:
        """Whether all workers that were there have left because they had done what there was to do."""
        return bool(self.workers) and all(worker.reason == "finished" for worker in self.workers.values())

    @property
    def samples(self) -> int:
        """Samples that were trained on, over all workers."""
        return self._samples

    @property
    def sent_bytes(self) -> int:
        """Bytes that all workers have sent, as far as they have told."""
        return self._sent

    @property
    def outcomes(self) -> Counter[str]:
        """Rounds of each worker, by what they came to."""
        totals: Counter[str] = Counter()
        for (_, outcome), count in self.rounds.items():
            totals[outcome] += count
        return totals

    def outcome_names(self) -> list[str]:
        """Return what rounds came to, without numbers, from the best on."""
        found = self.outcomes
        return [*(each for each in OUTCOMES if each in found), *sorted(set(found) - set(OUTCOMES))]

    @property
    def source(self) -> Source:
        """Who says what workers did when.

        "spent": records of every piece of time. "metered": accounts, now and then. "trained": local phases alone, so
        that talking and waiting are one. "accounts": nobody does, but the sums that workers leave with.
        """
        return next((source for source in ("spent", "metered", "trained") if source in self._sources), "accounts")

    def coverage(self) -> Coverage | None:
        """Return what became of leased samples; None for a run without leases, or one that contradicts itself."""
        found = None if self.contradiction else self._tally.coverage()
        return found if found and found.samples else None

    def apart(self) -> list[Apart]:
        """Return how far replicas were apart from evaluation to evaluation, as far as two or more have told."""
        while self._meetings:
            self._part()
        return self._apart.values()

    def see_all(self, records: Iterable[Record]) -> History:
        """Take in all of them; return this history."""
        for record in records:
            self.see(record)
        return self

    def see(self, record: Record) -> None:
        """Take in a record."""
        self.records += 1
        self.end_s = max(self.end_s, record.time_s)
        self.bins.reach(self.end_s)
        worker = self.workers.get(record.worker)
        if worker is None:
            worker = self.workers[record.worker] = WorkerHistory()
        self._follow_leases(record)
        match record:
            case Trained():
                self._trained(record, worker)
            case Synced():
                self._synced(record, worker)
            case Spent():
                self._did("spent", record, record.activity, record.time_s - record.seconds, record.seconds)
            case Metered():
                self._told("metered", record, record.seconds, worker)
                worker.received = record.received_bytes
            case Evaluated():
                self.looks.append(self._look(record))
            case Counterfactual():
                self.means.append(self._look(record))
            case Sketched():
                self._sketched(record, worker)
            case Joined():
                self._joined(record, worker)
            case Left():
                self._left(record, worker)
            case Refused():
                key = record.worker, record.source, record.code
                if key in self.refused or len(self.refused) < KEPT:
                    self.refused[key] += record.count
            case Rebuilt():
                whom = ", ".join(map(str, record.members))
                self._happened(record, f"rebuilt stage {record.stage} from workers {whom}")
            case Restored():
                if record.generation is None:
                    self._happened(record, f"goes on with its host's: {record.reason}")
                else:
                    self._happened(record, f"has its own back as of parity {record.generation}")

    def row(self, worker: int) -> int:
        """Return the row of the timeline that the worker is in."""
        return worker // self.workers_a_row

    def _trained(self, record: Trained, worker: WorkerHistory) -> None:
        worker.step = record.step
        worker.samples += record.samples
        self._samples += record.samples
        self.bins.add("samples", record.time_s, record.samples)
        if record.samples:
            worker.steps += record.steps
        if record.loss is not None:
            square = record.loss * record.loss
            if isfinite(square):
                self.bins.add("steps", record.time_s, record.steps)
                self.bins.add("loss", record.time_s, record.steps * record.loss)
                self.bins.add("squares", record.time_s, record.steps * square)
            else:
                self.not_finite += 1
        if record.seconds > 0:
            self._did("trained", record, "compute", record.time_s - record.seconds, record.seconds)

    def _synced(self, record: Synced, worker: WorkerHistory) -> None:
        worker.outcomes[record.outcome] += 1
        self.rounds[record.channel, record.outcome] += 1
        self.bins.add(("round", record.outcome), record.time_s, 1)
        self._count(record, worker)
        if record.outcome != "committed" and len(self.unsettled) < KEPT:
            key = record.channel, record.round, record.outcome, record.members
            self.unsettled.setdefault(key, Unsettled(record.time_s, *key))

    def _sketched(self, record: Sketched, worker: WorkerHistory) -> None:
        if record.number <= self._met:
            return
        meeting = self._meetings.setdefault(record.number, _Meeting())
        meeting.time_s = record.time_s
        meeting.stages[worker.stage].add(record.sketch)
        if len(self._meetings) > OPEN:
            self._part()

    def _part(self) -> None:
        """Come to a result about the earliest evaluation."""
        self._met = min(self._meetings)
        meeting = self._meetings.pop(self._met)
        stages = meeting.stages.values()
        if all(stage.count > 1 for stage in stages):
            self._apart.append(Apart(meeting.time_s, distance(stages)))

    def _joined(self, record: Joined, worker: WorkerHistory) -> None:
        self.parameters = max(self.parameters, record.parameters)
        came_back = bool(worker.stays) or worker.present_since is not None
        if came_back or record.time_s > 0:
            self._happened(record, "came back" if came_back else "came")
        if worker.present_since is not None:  # the run went on from a checkpoint, and the worker's accounts with it
            worker.stays.append(Stay(worker.present_since, record.time_s, "stopped"))
        worker.present_since = worker.told_at = record.time_s
        worker.stage = record.stage

    def _left(self, record: Left, worker: WorkerHistory) -> None:
        self._count(record, worker)
        self._told("accounts", record, record.seconds, worker)
        worker.step = max(worker.step, record.step)
        since = record.time_s if worker.present_since is None else worker.present_since
        worker.stays.append(Stay(since, record.time_s, record.reason))
        worker.earlier_sent += worker.sent
        worker.earlier_received += record.received_bytes
        worker.present_since, worker.sent, worker.received, worker.told = None, 0, 0, {}
        if record.reason not in TO_THE_END:
            self._happened(record, f"left: {record.reason}")

    def _count(self, record: Synced | Left, worker: WorkerHistory) -> None:
        """Count what was sent since the last time that the worker said how much."""
        fresh = record.sent_bytes - worker.sent
        if fresh < 0:  # a life of which nobody told the end
            worker.earlier_sent += worker.sent
            fresh = record.sent_bytes
        worker.sent = record.sent_bytes
        self._sent += fresh
        self.bins.add("sent", record.time_s, fresh)

    def _told(self, source: Source, record: Metered | Left, seconds: dict[str, float], worker: WorkerHistory) -> None:
        """Take in a worker's accounts: what is new in them is spread over the time since the last ones."""
        since = min(worker.told_at, record.time_s)
        for activity, total in seconds.items():
            fresh = max(0.0, total - worker.told.get(activity, 0.0))
            worker.seconds[activity] += fresh
            self.bins.spread(("metered", activity, self.row(record.worker)), since, record.time_s, fresh)
        worker.told, worker.told_at = dict(seconds), record.time_s
        self._sources.add(source)

    def _did(self, source: Source, record: Record, activity: str, since_s: float, seconds: float) -> None:
        self._sources.add(source)
        self.bins.spread((source, activity, self.row(record.worker)), since_s, record.time_s, seconds)

    def _look(self, record: Evaluated | Counterfactual) -> Look:
        return Look(record.time_s, self._samples, self._sent, record.worker, record.step, record.metrics)

    def _happened(self, record: Record, what: str) -> None:
        self.happened += 1
        if len(self.happenings) < KEPT:
            self.happenings.append(Happening(record.time_s, record.worker, what))

    def _follow_leases(self, record: Record) -> None:
        if self.contradiction:
            return
        try:
            self._tally.see(record)
        except VerificationError as error:
            self.contradiction = str(error)
