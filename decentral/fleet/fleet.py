"""The machines of a run: how fast they are, how they are joined, and what befalls them.

The real world uses the number of workers and their speeds (an emulated straggler is slowed down in proportion); the
simulated one uses all of it.
"""

from __future__ import annotations

from pydantic import Field

from decentral.errors import ConfigError
from decentral.fleet.churn import Churn, Exponential, Preemption, StageLosses
from decentral.fleet.events import Event
from decentral.fleet.groups import WorkerGroup
from decentral.fleet.links import FleetNetwork
from decentral.fleet.prices import Prices
from decentral.fleet.replay import Trace
from decentral.fleet.units import PositiveNumber
from decentral.naming import nearest
from decentral.part import Section

Churn.built_in.update({cls.name: cls for cls in (Trace, Preemption, Exponential, StageLosses)})
CHURN = Churn.built_in
"""The built-in models of churn by the name that run files use."""


class Fleet(Section):
    """Workers, links and events."""

    workers: tuple[WorkerGroup, ...] = (
        WorkerGroup(count=2),
        WorkerGroup(speed=0.7),
        WorkerGroup(speed=0.4),
    )
    """Groups of workers, numbered from 0 in this order."""
    step_time_s: PositiveNumber = 0.05
    """Simulated: seconds a local step takes at speed 1."""
    step_flops: PositiveNumber | None = None
    """Simulated: floating-point operations of a local step, for groups with a device; unset: 6 x parameters x tokens,
    where the task's samples consist of tokens."""
    jitter: float = Field(default=0.0, ge=0, le=2)
    """Simulated: sigma of a log-normal factor, of mean 1, on each local step's time."""
    up_bps: PositiveNumber = 100e6
    """Simulated: uplink of a worker in bits per second, where neither its group nor its site says it."""
    down_bps: PositiveNumber = 100e6
    """Simulated: downlink of a worker in bits per second, likewise."""
    latency_s: float = Field(default=0.02, ge=0, allow_inf_nan=False)
    """Simulated: one-way latency between any two workers in seconds, where no link or site says it."""
    coding_bps: PositiveNumber | None = None
    """Simulated: bits of float32 that a worker encodes, decodes or merges in a second, one packet after the other,
    beside training (`decentral profile`); unset: that takes no time."""
    detection_s: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    """Simulated: seconds until a crash is known to the others."""
    layerwise: bool = False
    """Simulated: workers start a layer's forward pass as soon as its update has come, and send it as soon as its last
    local step is done, as papers assume. Real ones, and these if false, wait for all layers and send all at once."""
    events: tuple[Event, ...] = ()
    """Simulated: what befalls the workers."""
    churn: Churn | None = None
    """Simulated: machines that are taken away and replaced: "trace", "preemption" or "exponential", or a built-in trace
    such as "bamboo:p3"; unset: none."""
    network: FleetNetwork = FleetNetwork()
    """What joins sites, partitions, and how flows share."""
    prices: Prices = Prices()
    """What traffic between sites costs."""

    @property
    def size(self) -> int:
        """Number of workers."""
        return sum(group.count for group in self.workers)

    def each(self) -> list[WorkerGroup]:
        """Return the group of every worker, in their order."""
        return [group for group in self.workers for _ in range(group.count)]

    def first(self, count: int) -> Fleet:
        """Return the fleet's first workers alone, and nothing of what befalls simulated ones."""
        groups: list[WorkerGroup] = []
        for group in self.workers:
            left = count - sum(each.count for each in groups)
            if left > 0:
                groups.append(group.model_copy(update={"count": min(left, group.count)}))
        return self.model_copy(update={"workers": tuple(groups), "events": (), "churn": None})

    def sites(self) -> list[str | None]:
        """Return the site of every worker, in their order."""
        return [group.site for group in self.each()]

    def places(self) -> dict[int, str]:
        """Return the site of every worker that has one."""
        return {worker: site for worker, site in enumerate(self.sites()) if site is not None}

    @property
    def brings_newcomers(self) -> bool:
        """Whether workers come, or come back, after the start."""
        late = any(group.start_s for group in self.workers)
        return late or self.churn is not None or any(event.kind == "join" for event in self.events)

    def check(self) -> None:
        """Raise `ConfigError` for a fleet without workers, or for events or churn that do not fit it."""
        if not self.workers:
            raise ConfigError("fleet.workers: empty; name at least one group, e.g. [[fleet.workers]] count = 4")
        for index, event in enumerate(self.events):
            self._check_event(event, f"fleet.events.{index}")
        late = any(group.start_s for group in self.workers)
        if self.churn is not None and late:
            raise ConfigError("fleet.churn: it says when workers come, and start_s of a group does so too; give one")
        if self.churn is not None:
            self.churn.check(self.sites())
        elif all(group.start_s for group in self.workers):
            raise ConfigError("fleet.workers: all of them come later (start_s), and somebody must begin the run")
        self.network.check(self.sites(), self.latency_s)
        self.prices.check(self.sites())

    def check_work(self, tokens: int | None) -> None:
        """Raise `ConfigError` if a group's step time cannot be told; `tokens` are those of a sample, None: no such."""
        for index, group in enumerate(self.workers):
            if group.mfu and self.step_flops is None and tokens is None:
                raise ConfigError(
                    f"fleet.workers.{index}.device: the step time of {group.device} cannot be told, for the task does "
                    "not say how many tokens a sample has; give fleet.step_flops, or step_time_s in the group"
                )

    def _check_event(self, event: Event, where: str) -> None:
        if event.worker is not None and event.worker >= self.size:
            raise ConfigError(f"{where}.worker: {event.worker}, but workers are numbered 0 to {self.size - 1}")
        if event.site is not None and event.site not in self.sites():
            known = sorted({site for site in self.sites() if site is not None})
            hint = nearest(event.site, known)
            raise ConfigError(f"{where}.site: no group is at '{event.site}'; {hint}sites: {', '.join(known) or 'none'}")
        there = sum(event.site in (None, site) for site in self.sites())
        if event.count is not None and event.count > there:
            raise ConfigError(f"{where}.count: {event.count}, but there are {there} workers to choose from")
