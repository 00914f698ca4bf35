"""`Grid`: which worker holds which stage of which replica."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grid:
    """Replicas of `stages` workers each, in the order of the fleet: worker `replica * stages + stage`.

    A *row* is one replica, the workers through which its batches go; a *column* are all who hold the same stage, among
    whom a sync rule runs.
    """

    stages: int = 1

    def stage(self, worker: int) -> int:
        return worker % self.stages

    def replica(self, worker: int) -> int:
        return worker // self.stages

    def worker(self, replica: int, stage: int) -> int:
        return replica * self.stages + stage

    def row(self, worker: int) -> tuple[int, ...]:
        """Return the workers of the same replica, by stage."""
        first = worker - self.stage(worker)
        return tuple(range(first, first + self.stages))

    def mates(self, worker: int) -> set[int]:
        """Return the other workers of the same replica."""
        return set(self.row(worker)) - {worker}

    def missing(self, workers: Collection[int]) -> list[int]:
        """Return the stages that none of the workers holds."""
        return sorted(set(range(self.stages)) - {self.stage(worker) for worker in workers})

    def column(self, worker: int, workers: int) -> tuple[int, ...]:
        """Return those of `workers` workers who hold the same stage; nobody if there is one stage alone."""
        return tuple(range(self.stage(worker), workers, self.stages)) if self.stages > 1 else ()


WHOLE = Grid()
"""Replicas of one worker each."""
