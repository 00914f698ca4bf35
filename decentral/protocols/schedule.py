"""When to talk: how many local steps lie between two rounds."""

from __future__ import annotations

import functools
import itertools
import random
from abc import abstractmethod
from bisect import bisect_right
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from decentral.inner import Inner
from decentral.naming import part_named
from decentral.part import Part
from decentral.peer import Peer
from decentral.replica import seed_of


class Schedule(Part):
    """Says, right after a round, how many local steps come before the next one."""

    @abstractmethod
    def steps(self, peer: Peer) -> int:
        """Return the length of the next local phase in local steps, at least 1."""


class Every(Schedule):
    """A round every `period` local steps. The last phase ends with the budget, so it may be shorter."""

    name = "every"
    period: int = Field(ge=1)
    """Local steps between rounds (H in the literature)."""

    def steps(self, peer: Peer) -> int:
        return self.period


class Planned(Schedule):
    """A schedule that depends on nothing but the step, so that all phases are known beforehand."""

    @abstractmethod
    def phase(self, step: int, total_steps: int, inner: Inner) -> int:
        """Return the length of the phase that begins at local step `step` of `total_steps`: local steps, at least 1."""

    def steps(self, peer: Peer) -> int:
        return self.phase(peer.step, peer.step + peer.steps_left, peer.inner)


class QSR(Planned):
    """Quadratic synchronisation rule: the smaller the learning rate, the longer a phase.

        H = max(H_base, floor((alpha / eta)^2)),   eta: the inner learning rate of the phase's first step

    Gu et al., arXiv 2310.14423, and its code: H changes right after a round only, and the last phase ends with the
    budget. During the warm-up eta is the peak, as if the warm-up were over.
    """

    name = "qsr"
    base: int = Field(default=4, ge=1)
    """Fewest local steps between rounds (H_base)."""
    alpha: float = Field(default=0.0175, ge=0)
    """Growth coefficient, a learning rate: phases begin to grow when eta falls below alpha / sqrt(H_base).

    It is tuned for each optimiser: about 0.0175 for a ViT under AdamW, 0.2 for ResNets under SGD (from memory of the
    paper).
    """

    def phase(self, step: int, total_steps: int, inner: Inner) -> int:
        if step >= total_steps:
            return self.base
        ratio = self.alpha / inner.lr_at(max(step, min(inner.warmup_steps, total_steps - 1)), total_steps)
        return max(self.base, int(min(ratio * ratio, total_steps)))


class Growing(Planned):
    """Phases that grow with the data processed: H = H_base (1 + t / horizon)^power after t local steps."""

    name = "growing"
    base: int = Field(default=10, ge=1)
    """Local steps of the first phase (H_base)."""
    horizon: int = Field(default=100, ge=1)
    """Local steps after which a phase is 2^power times as long as the first."""
    power: float = Field(default=0.5, ge=0, le=1)
    """How fast phases grow: 0 not at all, 1 in proportion to the data."""
    longest: int = Field(default=500, ge=1)
    """Most local steps between rounds."""

    def phase(self, step: int, total_steps: int, inner: Inner) -> int:
        return max(1, int(min(self.base * (1 + step / self.horizon) ** self.power, self.longest)))


class MatchedRandom(Schedule):
    """The phases of another schedule in random order: as many rounds of the same lengths, at other times.

    The control that an adaptive schedule must beat: what it gains over this one, its timing gains.
    """

    name = "matched_random"
    schedule: Annotated[Planned, BeforeValidator(lambda value: part_named(value, PLANNED, Planned, "schedule"))] = QSR()
    """The schedule whose phases are shuffled, alike for every worker."""

    def steps(self, peer: Peer) -> int:
        ends = _shuffled_ends(self.schedule, peer.step + peer.steps_left, peer.inner, peer.seed)
        return ends[bisect_right(ends, peer.step)] - peer.step if peer.steps_left else 1


@functools.lru_cache(maxsize=16)
def _shuffled_ends(schedule: Planned, total_steps: int, inner: Inner, seed: int) -> list[int]:
    """Return the local steps at which the shuffled phases end, the last being `total_steps`. Cached for all workers."""
    phases, step = [], 0
    while step < total_steps:
        phases.append(min(schedule.phase(step, total_steps, inner), total_steps - step))
        step += phases[-1]
    random.Random(seed_of(seed, "matched_random")).shuffle(phases)
    return list(itertools.accumulate(phases))


PLANNED: dict[str, type[Planned]] = {schedule.name: schedule for schedule in (QSR, Growing)}
SCHEDULES: dict[str, type[Schedule]] = {Every.name: Every, MatchedRandom.name: MatchedRandom, **PLANNED}


def _schedule(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"must be at least 1 local step, not {value}")
        return Every(period=value)
    return part_named(value, SCHEDULES, Schedule, "schedule")


Period = Annotated[Schedule, BeforeValidator(_schedule)]
"""A field type for rules: a whole number H (a round every H local steps) or a schedule by name."""


def _steps(value: Any) -> Any:
    if isinstance(value, Every):
        return value.period
    if isinstance(value, Schedule):
        raise ValueError(
            f"this rule talks at fixed steps; give a whole number of local steps, not '{value.spelling()}'"
        )
    return value


FixedPeriod = Annotated[int, BeforeValidator(_steps), Field(ge=1)]
"""A field type for rules whose rounds lie at fixed steps: a whole number H, or the schedule `every`."""
