"""What a run came to, whichever world it was in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from torch import Tensor

from decentral.accounts import Accounts
from decentral.coverage import Coverage, coverage
from decentral.grid import Grid
from decentral.journal import Evaluated, Joined, Left, Record, Synced, Trained
from decentral.traffic import Traffic
from decentral.verify import verified, verify


@dataclass(slots=True)
class Totals:
    """What reports say of all records together."""

    parameters: int = 0
    samples: int = 0
    rounds: Counter[str] = field(default_factory=Counter)
    """Rounds of each worker, by what they came to."""
    left: list[Left] = field(default_factory=list)
    evaluations: list[Evaluated] = field(default_factory=list)

    def counted(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield the records, each when it has been counted."""
        for record in records:
            if isinstance(record, Trained):
                self.samples += record.samples
            elif isinstance(record, Synced):
                self.rounds[record.outcome] += 1
            elif isinstance(record, Joined):
                self.parameters = record.parameters
            elif isinstance(record, Left):
                self.left.append(record)
            elif isinstance(record, Evaluated):
                self.evaluations.append(record)
            yield record


@dataclass(slots=True)
class Outcome:
    """The records of a run, its workers' final parameters, and the held-out metrics before and after.

    `records` can be gone through again and again; a run of times alone may make them anew each time.

    `params[worker]` is `[P]` float32 and there for every worker that finished. `merged` is what the run is for: the
    mean of the finished replicas (the replica itself when all are equal). Empty in timing-only mode. Where workers hold
    stages, `assemble` makes the whole model's parameters of every stage's.
    """

    records: Iterable[Record]
    seconds: float
    params: dict[int, Tensor] = field(default_factory=dict)
    slots: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    traffic: Traffic | None = None
    """What the network carried; simulated runs alone."""
    accounts: Accounts | None = None
    """Time, samples, bytes, dollars and energy; simulated runs alone."""
    grid: Grid = field(default_factory=Grid)
    assemble: Callable[[Sequence[Tensor]], Tensor] = itemgetter(0)
    _totals: Totals | None = None

    def verify(self) -> None:
        """Raise `VerificationError` if the run's records contradict each other; `decentral.verify` says how."""
        verify(self.records, self.traffic)

    def verified(self) -> Iterator[Record]:
        """Yield the records, each when it has been verified and counted: all in one pass, where passes are dear.

        Raises `VerificationError` as `verify` does, maybe at the end.
        """
        totals = Totals()
        yield from totals.counted(verified(self.records, self.traffic))
        self._totals = totals

    def coverage(self) -> Coverage:
        """Return which samples of a run with leases were consumed, and which more than once."""
        return coverage(self.records)

    def merged(self) -> Tensor:
        """Return the mean of the finished workers' parameters, `[P]`; bit-equal to each if all are bit-equal."""
        return self.assemble([self._mean_of(stage) for stage in range(self.grid.stages)])

    def _mean_of(self, stage: int) -> Tensor:
        first, *others = [self.params[worker] for worker in sorted(self.params) if self.grid.stage(worker) == stage]
        if all(other.equal(first) for other in others):
            return first
        total = first.clone()
        for other in others:
            total.add_(other)
        return total.div_(1 + len(others))

    @property
    def totals(self) -> Totals:
        """What the records come to, counted when it is first asked for."""
        if self._totals is None:
            self._totals = Totals()
            for _ in self._totals.counted(self.records):
                pass
        return self._totals

    def left(self) -> list[Left]:
        """Return every worker's last record, in order of workers."""
        return sorted(self.totals.left, key=lambda record: record.worker)

    def samples(self) -> int:
        """Return the samples trained on, over all workers."""
        return self.totals.samples

    def evaluations(self) -> list[Evaluated]:
        """Return the evaluations during the run, in order of time."""
        return self.totals.evaluations
