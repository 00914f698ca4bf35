"""When stages are lost: the same for every way to recover, and one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from decentral.fleet import Event, StageLosses
from decentral.fleet.churn import Sites
from decentral.fleet.units import PositiveNumber


class OneAtATime(StageLosses):
    """Losses of stages, less those that come while another one is being rebuilt.

    CheckFree cannot rebuild two neighbours that are lost together, and its authors lose one stage at a time.
    """

    name: ClassVar[str] = "one_at_a_time"

    speed_up: PositiveNumber = 1.0
    """Hours of losses that a virtual hour has: a stage is lost within it with the probability 1 - (1 - h)^speed_up."""
    apart_s: PositiveNumber = 180.0
    """Seconds after a loss in which no other is; by then the stage is back and at work."""

    def events(self, sites: Sites, seed: int) -> Iterator[Event]:
        """Yield the losses and returns of all stages."""
        per_hour = 1 - (1 - self.per_hour) ** self.speed_up
        fields = {name: getattr(self, name) for name in StageLosses.model_fields}
        every = StageLosses(**{**fields, "per_hour": per_hour})
        away, last_s = set[int | None](), -self.apart_s
        for event in every.events(sites, seed):
            if event.kind == "join":
                if event.worker in away:
                    away.remove(event.worker)
                    yield event
            elif not 0 < event.at_s - last_s < self.apart_s:
                away.add(event.worker)
                last_s = event.at_s
                yield event
