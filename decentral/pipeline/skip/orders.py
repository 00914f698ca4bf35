"""In which order a microbatch may visit stages: the limits within which a model still learns (SkipPipe's CC1, CC2)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

JUMP = 4
"""Stages that a microbatch may go ahead at once, 1 being the next; from SkipPipe's code, as are all limits here."""
SWAPS = 2
"""How often a microbatch may go back to a stage that it has left out. Each time it goes back by one stage, to the one
below the highest it has been at, so that the stages swapped are no further than this apart in all."""


class Progress(NamedTuple):
    """How far along the stages a microbatch is: all that limits where it may go next."""

    frontier: int = 0
    """The highest stage it has been at; stage 0 is the first of all (CC1)."""
    has_gap: bool = False
    """Whether it has left out the stage just below."""
    swaps: int = 0

    def ahead(self, stages: int) -> Iterator[tuple[int, Progress]]:
        """Yield the stages where it may go next, each with how far it is then; never one where it has been."""
        if self.has_gap and self.swaps < SWAPS:
            yield self.frontier - 1, Progress(self.frontier, False, self.swaps + 1)
        for stage in range(self.frontier + 1, min(self.frontier + JUMP, stages - 1) + 1):
            yield stage, Progress(stage, stage > self.frontier + 1, self.swaps)


START = Progress()


@cache
def orders_of(visited: frozenset[int], stages: int, progress: Progress = START) -> tuple[tuple[int, ...], ...]:
    """Return the orders in which all of these stages, and no others, may be visited next."""
    if not visited:
        return ((),)
    return tuple(
        (stage, *rest)
        for stage, then in progress.ahead(stages)
        if stage in visited
        for rest in orders_of(visited - {stage}, stages, then)
    )
