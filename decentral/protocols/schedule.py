"""When to talk: how many local steps lie between two rounds."""

from __future__ import annotations

import functools
import itertools
import math
import random
from abc import abstractmethod
from bisect import bisect_right
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from decentral.inner import Inner
from decentral.naming import Kind, part_named
from decentral.peer import Peer
from decentral.replica import seed_of

PROBE = 3
"""Local steps of a phase that finds the right length: few, for everybody waits for the slowest. The first warms up."""
TRIAL = 0.25
"""Share of its length that a phase has whose length rests on such a probe: few steps say little, and may mislead."""
ROUNDING = 1e-9
"""Steps by which sums of floating-point seconds may fall short of a whole one."""


class Schedule(Kind):
    """Says, right after a round, how many local steps come before the next one."""

    called = "schedule"
    built_in: ClassVar[dict[str, type[Schedule]]] = {}

    equal: ClassVar[bool] = True
    """Whether the phases of all workers are equally long in local steps."""

    @classmethod
    def named(cls, value: Any) -> Any:
        """Return the schedule that `value` names; a whole number H is short for a round every H local steps."""
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 1:
                raise ValueError(f"must be at least 1 local step, not {value}")
            return Every(period=value)
        return super().named(value)

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
        return self.phase(peer.step, peer.budget, peer.inner)


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
        ends = _shuffled_ends(self.schedule, peer.budget, peer.inner, peer.seed)
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


class Timed(Schedule):
    """A round about every so many seconds: each worker does as many local steps as it can in that time.

        H_i = floor(T / s_i), at least 1;   s_i: seconds that a local step takes worker i

    Workers need not hear of each other for it. The first phase is a few steps: one to warm up, others that tell a
    worker its speed; the second lasts T / 4, and says so with more of them. From then on a phase of constant speed
    takes more than T - s_i seconds and at most T, so nobody waits longer than one step of its own. What others do is
    not fed back and a measurement is soon forgotten: there is nothing that could swing.
    """

    name = "timed"
    equal = False
    seconds: float = Field(gt=0, allow_inf_nan=False)
    """Seconds of computing between rounds (T)."""

    def steps(self, peer: Peer) -> int:
        own = peer.speeds.own
        if own is None:
            peer.probe()
            return PROBE
        share = TRIAL if peer.speeds.rough else 1.0
        return max(1, int(share * self.seconds / own + ROUNDING))


class DyLU(Schedule):
    """The fastest worker does H local steps, each other one as many as it can in that time.

        H_i = floor(H v_i / max_j v_j);   v_i = 1 / s_i, local steps a second

    Dynamic local updates, Liu et al., arXiv 2401.09135, section 4, for rules without a server; as `timed` with
    T = H min_j s_j. When a phase ends each worker tells all others its s_i, a packet of a few bytes, which is there
    before the round has ended. The first phase is a few steps, and the second has a quarter of its length, as `timed`.
    """

    name = "dylu"
    equal = False
    period: int = Field(ge=1)
    """Local steps of the fastest worker between rounds (H)."""
    ratio: float = Field(default=20.0, ge=1)
    """How many times more steps the fastest may do than any other worker. One that is slower than that makes the others
    wait; one that says it is faster cannot make their phases shorter than H / ratio."""

    def steps(self, peer: Peer) -> int:
        peer.probe(then=peer.tell_speed)
        own, others = peer.speeds.own, [worker for worker in peer.members if worker != peer.id]
        told = peer.speeds.of(others)
        if own is None or (others and not told):
            return min(PROBE, self.period)
        period = self.period * (TRIAL if peer.speeds.rough else 1.0)
        return max(math.ceil(period / self.ratio), int(period * min([own, *told]) / own + ROUNDING))


PLANNED: dict[str, type[Planned]] = {schedule.name: schedule for schedule in (QSR, Growing)}
Schedule.built_in.update({schedule.name: schedule for schedule in (Every, MatchedRandom, Timed, DyLU)}, **PLANNED)
SCHEDULES = Schedule.built_in


def _require_equal(schedule: Schedule) -> Schedule:
    if not schedule.equal:
        equal = ", ".join(sorted(name for name, each in SCHEDULES.items() if each.equal))
        raise ValueError(
            f"this rule needs equally long phases on all workers, and '{schedule.spelling()}' fits them to each one's "
            f"speed; give a whole number of local steps, or one of {equal}"
        )
    return schedule


EQUAL = AfterValidator(_require_equal)
EqualPeriod = Annotated[Schedule, EQUAL]
"""A field type for rules whose workers must do equally many local steps: a `Schedule` that sees to it."""


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
