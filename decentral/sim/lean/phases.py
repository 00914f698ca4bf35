"""How long the local phases of a run are, where that is known beforehand and the same for everybody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from decentral.config import Run
from decentral.inner import Inner
from decentral.peer import Peer
from decentral.protocols.schedule import SCHEDULES, Schedule


@dataclass(slots=True)
class _Walker:
    """What schedules ask of a peer."""

    budget: int
    seed: int
    inner: Inner
    step: int = 0

    @property
    def steps_left(self) -> int:
        return self.budget - self.step


def phases_of(period: Schedule, run: Run) -> list[int]:
    """Return the lengths of the local phases in local steps; empty if workers differ, or the schedule is not ours."""
    phases: list[int] = []
    if period.equal and type(period) in SCHEDULES.values():
        worker = _Walker(run.steps, run.seed, run.inner)
        while worker.steps_left:
            phases.append(min(period.steps(cast(Peer, worker)), worker.steps_left))
            worker.step += phases[-1]
    return phases
