"""Workers whose model is cut anew while they have it: what one needs of another's state goes from there to here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import networkx
import ray
import ray.exceptions

from decentral.checkpoint import Description
from decentral.config import Run
from decentral.errors import RunError
from decentral.journal import Record
from decentral.pipeline import Assembly, OldStages
from decentral.workers.cluster import first_line
from decentral.workers.resume import Resumption, go_on_from

MOVE_S = 600.0
"""Seconds that states may take from worker to worker."""

log = logging.getLogger(__name__)


class Parted(NamedTuple):
    """What the workers of a run had at the point at which all left, and how many lines of the journal."""

    workers: Mapping[int, Description]
    lines: Mapping[int, int]


class Crew:
    """The actors of a run's workers, which have `parted`, by worker; those of `staying` can be workers again."""

    def __init__(self, run: Run, parted: Parted, actors: Mapping[int, Any], staying: Collection[int]) -> None:
        self._run, self._parted = run, parted
        self._actors, self._staying = dict(actors), set(staying)

    def resumption(self, run: Run, journal: Iterable[Record]) -> Resumption:
        """Return where `run`, which is theirs with other stages, goes on; that has left this journal."""
        return go_on_from(run, *self._parted, self._run.pipeline.stages, journal)

    def hand_over(self, run: Run, hire: Callable[[int], Any]) -> dict[int, Any]:
        """Return the actors of that run's workers, by worker, each with the state that it begins with.

        Whoever has most of a new stage becomes its worker, so that as little as possible moves; the rest is sent to it
        by those who have it, and by nobody twice. `hire(worker)` makes an actor where there are too few. Raises
        `RunError` if somebody is lost meanwhile.
        """
        needs = self._needs(run)
        seats = seats_for({worker: self._sizes(need) for worker, need in needs.items()}, self._staying)
        given = {
            worker: [
                actor.give.remote(need)
                for old, actor in self._actors.items()
                if old != seats.get(worker) and any(need.parts(old))
            ]
            for worker, need in needs.items()
        }
        parts = [part for parts in given.values() for part in parts]
        if parts and ray.wait(parts, num_returns=len(parts), timeout=MOVE_S, fetch_local=False)[1]:
            raise RunError(f"within {MOVE_S:g} s the workers have not given what others need of their states")
        crew = {worker: self._actors.pop(seats[worker]) if worker in seats else hire(worker) for worker in needs}
        self.release()  # those who are left, and have given what they had
        table = run.to_table()
        told = [crew[worker].anew.remote(table, worker, needs[worker], *given[worker]) for worker in needs]
        try:
            ray.get(told, timeout=MOVE_S)
        except ray.exceptions.RayError as error:
            for actor in crew.values():
                ray.kill(actor)
            raise RunError(f"a worker was lost while the model was cut anew: {first_line(error)}") from None
        needed = sum(nbytes for need in needs.values() for nbytes in self._sizes(need).values())
        stayed = sum(self._sizes(needs[worker])[old] for worker, old in seats.items())
        log.info("%.0f %% of %.1f MB of state have gone to another worker", 100 - 100 * stayed / needed, needed / 1e6)
        return crew

    def release(self) -> None:
        """Have the actors end that are nobody's."""
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors = {}

    def _needs(self, run: Run) -> dict[int, Assembly]:
        task = run.make_task()
        old = self._run.pipeline.layouts(task, run.seed, run.batch_size)
        new = run.pipeline.layouts(task, run.seed, run.batch_size)
        buffers, grid = run.pipeline.buffers(task, run.seed, run.batch_size), run.pipeline.grid
        stages = OldStages(old, self._parted.workers)
        return {
            worker: stages.assembly(grid.replica(worker), new[grid.stage(worker)], buffers[grid.stage(worker)])
            for worker in range(run.fleet.size)
        }

    def _sizes(self, need: Assembly) -> dict[int, int]:
        """Return how many bytes of it each of us has."""
        return {worker: need.nbytes(worker, described) for worker, described in self._parted.workers.items()}


def seats_for(sizes: Mapping[int, Mapping[int, int]], staying: Collection[int]) -> dict[int, int]:
    """Return which of those who are `staying` becomes which new worker, so that as little as possible has to move.

    `sizes` says by new worker, and by old one, how many bytes of the new one's state the old one has. If there are
    fewer than needed, those become workers who have something of theirs, if there are any.
    """
    graph = networkx.Graph()
    for worker, held in sizes.items():
        for old in sorted(staying):
            graph.add_edge(("new", worker), ("old", old), weight=held.get(old, 0))
    pairs = (dict(pair) for pair in networkx.max_weight_matching(graph, maxcardinality=True))
    return {pair["new"]: pair["old"] for pair in pairs}
