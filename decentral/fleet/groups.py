"""Workers of one kind."""

from __future__ import annotations

from pydantic import Field

from decentral.fleet.units import PositiveNumber
from decentral.part import Section


class WorkerGroup(Section):
    """Some workers of one kind."""

    count: int = Field(default=1, ge=1)
    """How many."""
    speed: float = Field(default=1.0, gt=0, le=1)
    """Local steps a second, relative to the fastest worker."""
    up_bps: PositiveNumber | None = None
    """Uplink in bits per second; the fleet's if unset."""
    down_bps: PositiveNumber | None = None
    """Downlink in bits per second; the fleet's if unset."""
