"""With how many stages a run had better go on, by the workers for whom the cluster has places."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import ray
import ray.exceptions

from decentral.config import Run
from decentral.grid import Grid

PATIENCES = 2
"""So many times a run's patience no row may be whole before the model is cut anew for the places that there are."""
ANSWER_S = 10.0
"""Seconds that those who hold places have to say that they still do."""


class Spare:
    """Takes the place of a worker that a run has not, until it is told that there are enough of them."""

    def placed(self) -> None:
        """Return: there is a place."""


class Shortage:
    """Watches for how many workers of a run there are places.

    As long as one row is whole it trains, and the others' places are waited for. When none is, and stays so for
    `PATIENCES` times the run's patience, each replica has as many stages as there are places for all of them; that is
    no fewer than `pipeline.least`, or they are waited for too.
    """

    def __init__(self, run: Run) -> None:
        self._replicas, self._least = run.replicas, run.pipeline.least or run.pipeline.stages
        self._grid, self._wait_s = Grid(run.pipeline.stages), PATIENCES * run.patience_s
        self._whole_s: float | None = None  # when a row was whole last

    def stages(self, placed: Collection[int]) -> int | None:
        """Return how many stages there may be if these workers have places; None: as many as there are, or too few."""
        stages = len(placed) // self._replicas
        return stages if self._least <= stages < self._grid.stages and not self._has_row(placed) else None

    def lasting(self, placed: Collection[int], now_s: float) -> int | None:
        """Return the same when it has been so for long; these workers have places now."""
        if self._whole_s is None or self._has_row(placed):
            self._whole_s = now_s
        return self.stages(placed) if now_s - self._whole_s > self._wait_s else None

    def _has_row(self, placed: Collection[int]) -> bool:
        rows = (self._grid.row(self._grid.worker(replica, 0)) for replica in range(self._replicas))
        return any(set(row) <= set(placed) for row in rows)


class Spares:
    """Places for more workers, which a run asks Ray for that has fewer stages than it might: a cluster may grow."""

    def __init__(self, ask: Callable[[str], Any], count: int) -> None:
        """`ask(name)` asks for an actor of the class `Spare` that is as large as a worker; `count` are wanted."""
        self._ask, self._count, self._asked = ask, count, 0
        self._held: list[tuple[Any, Any]] = []  # actors, and what is done when Ray has found a place for them

    def want(self) -> None:
        """Ask for all of them, if that has not been done."""
        while len(self._held) < self._count:
            actor = self._ask(f"spare-{self._asked}")
            self._held.append((actor, actor.placed.remote()))
            self._asked += 1

    def are_there(self) -> bool:
        """Return whether all are there."""
        if not self._held or len(done_of([placed for _, placed in self._held])) < self._count:
            return False
        try:
            ray.get([actor.placed.remote() for actor, _ in self._held], timeout=ANSWER_S)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):  # a place is gone again
            self.forget()
            return False
        return True

    def forget(self) -> None:
        """Let go of the places, and want none."""
        for actor, _ in self._held:
            ray.kill(actor)
        self._held = []


def done_of(refs: Sequence[Any]) -> set[Any]:
    """Return those of these references of which there is an answer, or will never be one."""
    return set(ray.wait(list(refs), num_returns=len(refs), timeout=0)[0]) if refs else set()
