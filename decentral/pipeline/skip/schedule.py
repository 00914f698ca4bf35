"""What a planner comes to: a path for each microbatch of an iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from decentral.pipeline.skip.costs import Costs
from decentral.pipeline.skip.replay import Visit, replay


class Microbatch(NamedTuple):
    """Whose microbatch it is, and which of those that its origin starts, counted from 0."""

    origin: int
    slot: int


class Schedule(NamedTuple):
    """Who takes which path, and when that would have each where. Made by `schedule_of`."""

    microbatches: tuple[Microbatch, ...]
    paths: tuple[tuple[int, ...], ...]
    """The nodes that each visits, in this order, its origin first. The return to it is not in there."""
    visits: tuple[tuple[Visit, ...], ...]
    """What becomes of each, as `replay` foresees it."""
    makespan_s: float
    """Seconds until the last one is back at its origin."""


def microbatches_of(origins: Sequence[int], slots: int) -> tuple[Microbatch, ...]:
    """Return the microbatches of an iteration: the first of every origin, then the second of each, and so on."""
    return tuple(Microbatch(origin, slot) for slot in range(slots) for origin in origins)


def schedule_of(
    microbatches: tuple[Microbatch, ...], paths: Sequence[tuple[int, ...]], costs: Costs, memory: int | None = None
) -> Schedule:
    """Return the schedule in which microbatch `m` takes `paths[m]`; `memory` is as in `replay`."""
    return Schedule(microbatches, tuple(paths), *replay(paths, costs, memory))
