"""The machines of a run: how fast they are, how they are joined, and what befalls them.

The real world uses the number of workers and their speeds (an emulated straggler is slowed down in proportion); the
simulated one uses all of it.
"""

from __future__ import annotations

from pydantic import Field

from decentral.errors import ConfigError
from decentral.fleet.events import Event
from decentral.fleet.groups import WorkerGroup
from decentral.fleet.units import PositiveNumber
from decentral.part import Section


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
    jitter: float = Field(default=0.0, ge=0, le=2)
    """Simulated: sigma of a log-normal factor, of mean 1, on each local step's time."""
    up_bps: PositiveNumber = 100e6
    """Simulated: uplink of a worker in bits per second."""
    down_bps: PositiveNumber = 100e6
    """Simulated: downlink of a worker in bits per second."""
    latency_s: float = Field(default=0.02, ge=0, allow_inf_nan=False)
    """Simulated: one-way latency between any two workers in seconds."""
    detection_s: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    """Simulated: seconds until a crash is known to the others."""
    events: tuple[Event, ...] = ()
    """Simulated: what befalls the workers."""

    @property
    def size(self) -> int:
        """Number of workers."""
        return sum(group.count for group in self.workers)

    def each(self) -> list[WorkerGroup]:
        """Return the group of every worker, in their order."""
        return [group for group in self.workers for _ in range(group.count)]

    def check(self) -> None:
        """Raise `ConfigError` for a fleet without workers or an event at a worker that does not exist."""
        if not self.workers:
            raise ConfigError("fleet.workers: empty; name at least one group, e.g. [[fleet.workers]] count = 4")
        for index, event in enumerate(self.events):
            if event.worker >= self.size:
                raise ConfigError(
                    f"fleet.events.{index}.worker: {event.worker}, but workers are numbered 0 to {self.size - 1}"
                )
