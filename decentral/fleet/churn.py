"""Churn: models that say when machines are taken away and when others come in their place.

A model is a pure function of the fleet's sites and the run's seed, so that every rule meets the same churn, and a
longer look ahead never changes what comes before.
"""

from __future__ import annotations

import heapq
import math
from abc import abstractmethod
from bisect import insort
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from decentral.errors import ConfigError
from decentral.fleet.events import Event
from decentral.fleet.traces import TRACES
from decentral.fleet.units import HOUR_S, PositiveNumber, Seconds
from decentral.naming import Kind
from decentral.replica import seed_of

Sites = Sequence[str | None]
"""The site of each worker, in their order."""

Rate = Annotated[float, Field(gt=0, le=HOUR_S)]
"""Losses for each hour that a machine is there; more than one a second is a mistake."""


class Churn(Kind):
    """Which workers are there at the start, and an endless or finite stream of "preempt" and "join" events."""

    called = "model of churn"
    built_in: ClassVar[dict[str, type[Churn]]] = {}

    @classmethod
    def named(cls, value: Any) -> Any:
        """Return the model that `value` names; the name of a built-in trace is short for a table with it."""
        return super().named(
            {"name": "trace", "source": value} if isinstance(value, str) and value in TRACES else value
        )

    notice_s: Seconds = 0.0
    """Seconds between the notice of a preemption and the end: 120 on AWS, 30 on Google Cloud, 0 without notice."""

    @abstractmethod
    def events(self, sites: Sites, seed: int) -> Iterator[Event]:
        """Yield events of single workers in the order of their time."""

    def starters(self, sites: Sites) -> frozenset[int]:
        """Return the workers who are there at the start."""
        return frozenset(range(len(sites)))

    def check(self, sites: Sites) -> None:
        """Raise `ConfigError` if the model does not fit a fleet of these workers."""


class Preemption(Churn):
    """Correlated preemptions: at one instant a site loses a group of machines, and others take their places later.

    A machine that is there is lost with the rate r, however many there are: with n of them, groups go at the rate
    r n / E[min(G, n)], uniformly chosen, and G is geometric with mean m: P(G = g) = (1 - 1/m)^(g - 1) / m. Of the lost
    machines 1 - 1/m^2 then go in groups of two or more. The place of a lost machine is empty for an exponential time.
    Sites are independent. How well this fits real traces: `python -m benchmarks.churn_fit`.
    """

    name: ClassVar[str] = "preemption"

    rate_per_hour: Rate
    """r: preemptions for each hour that a machine is there (AWS V100: 0.61, AWS T4: 0.55)."""
    group_mean: float = Field(ge=1, allow_inf_nan=False)
    """m: mean number of machines that a site loses at one instant (AWS V100: 2.1, AWS T4: 1.5)."""
    reacquire_s: PositiveNumber | None = None
    """Mean seconds until another machine takes the place of a lost one; unset: none ever does."""

    def events(self, sites: Sites, seed: int) -> Iterator[Event]:
        """Yield the preemptions and returns of all sites."""
        streams = []
        for site in dict.fromkeys(sites):
            workers = [worker for worker, its_site in enumerate(sites) if its_site == site]
            streams.append(self._site(workers, np.random.default_rng(seed_of(seed, "preemption", site))))
        return heapq.merge(*streams, key=lambda event: event.at_s)

    def _site(self, present: list[int], chance: np.random.Generator) -> Iterator[Event]:
        """Yield one site's events: all waiting times are exponential, so they may be drawn anew after each event."""
        away: list[tuple[float, int]] = []  # heap of (when its place is taken again, worker)
        now = 0.0
        while present or away:
            loss_at = now + chance.exponential(HOUR_S / self._groups_per_hour(len(present))) if present else np.inf
            if away and away[0][0] <= loss_at:
                now, worker = heapq.heappop(away)
                insort(present, worker)
                yield Event(at_s=now, kind="join", worker=worker)
                continue
            now = float(loss_at)
            size = min(int(chance.geometric(1 / self.group_mean)), len(present))
            for place in sorted(chance.choice(len(present), size, replace=False).tolist(), reverse=True):
                worker = present.pop(place)
                if self.reacquire_s is not None:
                    heapq.heappush(away, (now + self.notice_s + chance.exponential(self.reacquire_s), worker))
                yield Event(at_s=now, kind="preempt", worker=worker, notice_s=self.notice_s)

    def _groups_per_hour(self, machines: int) -> float:
        single = 1 / self.group_mean
        mean_size = (1 - (1 - single) ** machines) / single  # E[min(G, n)] of the geometric law
        return self.rate_per_hour * machines / mean_size


class Exponential(Churn):
    """Independent preemptions: every machine lives for an exponential time of its own. For comparison: spot machines
    do not die one by one."""

    name: ClassVar[str] = "exponential"

    rate_per_hour: Rate
    """Preemptions for each hour that a machine is there."""
    reacquire_s: PositiveNumber | None = None
    """Mean seconds until another machine takes the place of a lost one; unset: none ever does."""

    def events(self, sites: Sites, seed: int) -> Iterator[Event]:
        """Yield the preemptions and returns: groups of one."""
        alone = Preemption(
            rate_per_hour=self.rate_per_hour,
            group_mean=1.0,
            reacquire_s=self.reacquire_s,
            notice_s=self.notice_s,
        )
        return alone.events(sites, seed)


class StageLosses(Churn):
    """Losses of whole stages of a pipeline: of each with the same probability in every hour, independent of the others.

    All who hold the stage go at once, in all replicas, and come back after `restart_s` seconds. Of an iteration of T
    seconds a stage is lost with the probability 1 - (1 - h)^(T / 3600), as in CheckFree (Blagoev et al.,
    arXiv 2506.15461).
    """

    name: ClassVar[str] = "stage_losses"

    per_hour: float = Field(gt=0, lt=1)
    """h: the probability that a stage is lost within an hour."""
    stages: int = Field(ge=2)
    """Stages of the pipeline."""
    restart_s: PositiveNumber = 30.0
    """Seconds until a lost stage's workers are there again."""
    spared: tuple[int, ...] = ()
    """Stages that are never lost, such as those that hold embedding and head where nothing could rebuild these."""

    def check(self, sites: Sites) -> None:
        """Raise `ConfigError` for workers that make no whole replicas, and for spared stages that there are not."""
        if len(sites) % self.stages:
            raise ConfigError(
                f"fleet.churn.stages: {self.stages} workers make a replica, and the fleet has {len(sites)}"
            )
        if not set(self.spared) < set(range(self.stages)):
            raise ConfigError(
                f"fleet.churn.spared: {list(self.spared)}; name some of the stages 0 to {self.stages - 1}, not all"
            )

    def events(self, sites: Sites, seed: int) -> Iterator[Event]:
        """Yield the losses and returns of all stages."""
        streams = [self._stage(stage, sites, seed) for stage in range(self.stages) if stage not in self.spared]
        return heapq.merge(*streams, key=lambda event: event.at_s)

    def _stage(self, stage: int, sites: Sites, seed: int) -> Iterator[Event]:
        """Yield one stage's events: while it is there, the time to its loss is exponential."""
        chance, now = np.random.default_rng(seed_of(seed, "stage losses", stage)), 0.0
        mean_s = -HOUR_S / math.log1p(-self.per_hour)
        while True:
            now += float(chance.exponential(mean_s))
            for worker in range(stage, len(sites), self.stages):
                yield Event(at_s=now, kind="preempt", worker=worker, notice_s=self.notice_s)
            now += self.notice_s + self.restart_s
            for worker in range(stage, len(sites), self.stages):
                yield Event(at_s=now, kind="join", worker=worker)
