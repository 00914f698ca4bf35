"""What a run came to, whichever world it was in."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from decentral.accounts import Accounts
from decentral.journal import Evaluated, Left, Record, Trained
from decentral.traffic import Traffic
from decentral.verify import verify


@dataclass(slots=True)
class Outcome:
    """The records of a run, its workers' final parameters, and the held-out metrics before and after.

    `params[worker]` is `[P]` float32 and there for every worker that finished. `merged` is what the run is for: the
    mean of the finished replicas (the replica itself when all are equal). Empty in timing-only mode.
    """

    records: list[Record]
    seconds: float
    params: dict[int, Tensor] = field(default_factory=dict)
    slots: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    traffic: Traffic | None = None
    """What the network carried; simulated runs alone."""
    accounts: Accounts | None = None
    """Time, samples, bytes, dollars and energy; simulated runs alone."""

    def verify(self) -> None:
        """Raise `VerificationError` if the run's records contradict each other; `decentral.verify` says how."""
        verify(self.records, self.traffic)

    def merged(self) -> Tensor:
        """Return the mean of the finished workers' parameters, `[P]`; bit-equal to each if all are bit-equal."""
        first, *others = [self.params[worker] for worker in sorted(self.params)]
        if all(other.equal(first) for other in others):
            return first
        total = first.clone()
        for other in others:
            total.add_(other)
        return total.div_(1 + len(others))

    def left(self) -> list[Left]:
        """Return every worker's last record, in order of workers."""
        return sorted((r for r in self.records if isinstance(r, Left)), key=lambda record: record.worker)

    def samples(self) -> int:
        """Return the samples trained on, over all workers."""
        return sum(record.samples for record in self.records if isinstance(record, Trained))

    def evaluations(self) -> list[Evaluated]:
        """Return the evaluations during the run, in order of time."""
        return [record for record in self.records if isinstance(record, Evaluated)]
