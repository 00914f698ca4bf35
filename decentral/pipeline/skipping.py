"""`Skipping`: microbatches that leave out stages, on paths planned for what machines and links take."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

from pydantic import Field

from decentral.errors import ConfigError
from decentral.fleet import Fleet
from decentral.fleet.sites import Range, line_of
from decentral.grid import Grid
from decentral.pipeline.cut import Cut
from decentral.pipeline.paths import BACK, FORWARD_SHARE, Action, Ground, Hop, Path, Paths
from decentral.pipeline.skip import Costs, Schedule, place, random_skip, search


class Skipping(Paths):
    """Each microbatch visits the first stage and some of the others, in an order of its own, and ends at the first.

    Between replicas too: a stage's worker is chosen by how near it is and how busy. All stages are visited equally
    often, and nobody more often than its memory holds microbatches. Workers do in turn what the plan foresees.
    SkipPipe, Blagoev et al., arXiv 2502.19913; how it is planned: `decentral.pipeline.skip`.
    """

    name = "skip"
    crosses = True

    visits: int = Field(ge=2)
    """Stages that each microbatch visits, the first included; of S stages it skips S - visits."""
    memory: int | None = Field(default=None, ge=1)
    """Microbatches of a batch that a worker holds at most; unset: as many as a first stage begins."""
    plan: Literal["costs", "random"] = "costs"
    """By what machines and links take as the run file describes them, or the same search without knowing that."""

    def check(self, stages: int, microbatches: int, head: Literal["last", "first"]) -> None:
        if self.visits > stages:
            raise ConfigError(f"pipeline.paths.visits: {self.visits}, but there are {stages} stages")
        if head != "first":
            raise ConfigError(
                "pipeline.paths: 'skip' brings microbatches back to the first stage for the loss; set pipeline.head = "
                '"first"'
            )

    def check_cut(self, cut: Cut) -> None:
        cut.require_any_order()

    def ways(self, ground: Ground, draw: int) -> list[Path]:
        cut, grid = ground.cut, Grid(ground.cut.stages)
        schedule, found = self._schedule(ground), []
        run, head = cut.held[0]
        for (origin, slot), nodes in zip(schedule.microbatches, schedule.paths, strict=True):
            middles = [(worker, cut.middle(grid.stage(worker))) for worker in nodes[1:]]
            runs = [(origin, run), *middles, (origin, head)]
            hops = tuple(Hop(worker, blocks.start, blocks.stop) for worker, blocks in runs)
            found.append(Path(grid.replica(origin), slot, hops))
        return found

    def order(self, ground: Ground, draw: int) -> dict[int, list[Action]]:
        """Return what each worker does in the order of the plan's times; the loss is the head's pass there and back."""
        timed: dict[int, list[tuple[float, Action]]] = {}
        for number, visits in enumerate(self._schedule(ground).visits):
            last = len(visits) // 2  # forward through all nodes, the loss, and back through all
            for index, visit in enumerate(visits):
                actions = timed.setdefault(visit.node, [])
                if index <= last:
                    actions.append((visit.start_s, Action("forward", number, index)))
                if index >= last:
                    actions.append((visit.start_s, Action("backward", number, len(visits) - 1 - index)))
        return {worker: [action for _, action in sorted(actions, key=_when)] for worker, actions in timed.items()}

    def _schedule(self, ground: Ground) -> Schedule:
        grid, stages = Grid(ground.cut.stages), range(ground.cut.stages)
        nodes = tuple(tuple(grid.worker(replica, stage) for replica in ground.replicas) for stage in stages)
        memory = self.memory or ground.microbatches
        try:
            return _planned(costs_of(ground), nodes, ground.microbatches, self.visits, memory, self.plan, ground.seed)
        except ConfigError as error:
            raise ConfigError(f"pipeline.paths: {error}") from error


def _when(timed: tuple[float, Action]) -> tuple[float, int, bool, int]:
    """The head goes back at once; otherwise by time, and at one instant by microbatch."""
    at_s, action = timed
    return at_s, action.path, action.kind == "backward", action.place


@lru_cache(maxsize=4)
def _planned(
    costs: Costs,
    nodes: tuple[tuple[int, ...], ...],
    slots: int,
    visits: int,
    memory: int,
    plan: Literal["costs", "random"],
    seed: int,
) -> Schedule:
    """All workers of a simulation ask for the same schedule, which takes seconds to find."""
    if plan == "random":
        return random_skip(nodes, slots, visits, memory, costs, seed)
    return search(nodes, slots, visits, memory, costs, seed=seed)


def costs_of(ground: Ground) -> Costs:
    """Return what a microbatch takes at each worker and between any two, in seconds, as the run file describes them."""
    cut, fleet = ground.cut, ground.fleet
    groups, grid = fleet.each(), Grid(cut.stages)
    steps = [(group.step_time_s or fleet.step_time_s) / group.speed for group in groups]
    shares = [cut.share(cut.held[stage][0]) for stage in range(cut.stages)]
    head = cut.share(cut.held[0][1]) / shares[0]
    forward = [
        FORWARD_SHARE * seconds * shares[grid.stage(worker)] / ground.microbatches
        for worker, seconds in enumerate(steps)
    ]
    nbytes = ground.codec.wire_bytes(math.prod(cut.shape(cut.held[0][0].stop)))
    links = tuple(map(tuple, link_seconds(fleet, nbytes)))
    return Costs(tuple(forward), links, loss_share=head * (1 + BACK), backward_factor=BACK)


def link_seconds(fleet: Fleet, nbytes: int) -> list[list[float]]:
    """Return the seconds that a message of so many bytes takes from each worker to each, if it shares no line."""
    groups, sites = fleet.each(), fleet.sites()
    routes = fleet.network.routes(sites, fleet.latency_s)
    lines = [line_of(site) for site in sites]
    each = list(zip(groups, lines, strict=True))
    up = [group.up_bps or (_mean(line.up_bps) if line else fleet.up_bps) for group, line in each]
    down = [group.down_bps or (_mean(line.down_bps) if line else fleet.down_bps) for group, line in each]
    access = [_mean(line.access_s) if line else 0.0 for line in lines]
    found = []
    for source, here in enumerate(sites):
        row = []
        for to, there in enumerate(sites):
            route = routes[here, there]
            bps = min(up[source], down[to], route.bps)
            row.append(route.latency_s + access[source] + access[to] + 8 * nbytes / bps)
        found.append(row)
    return found


def placed(fleet: Fleet, stages: int, nbytes: int, seed: int = 0) -> Fleet:
    """Return the fleet with its workers in the order in which stages are near one another, for messages of `nbytes`.

    Raises `ConfigError` if they make no whole replicas.
    """
    if fleet.size % stages:
        raise ConfigError(f"pipeline.stages: {stages} workers make a replica, and the fleet has {fleet.size}")
    groups, replicas = fleet.each(), fleet.size // stages
    found = place(link_seconds(fleet, nbytes), [replicas] * stages, seed).stages
    order = [found[stage][replica] for replica in range(replicas) for stage in range(stages)]
    return fleet.model_copy(update={"workers": tuple(groups[node].model_copy(update={"count": 1}) for node in order)})


def _mean(span: Range) -> float:
    """Return the middle of what is drawn log-uniformly."""
    return math.sqrt(span[0] * span[1])
