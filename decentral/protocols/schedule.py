"""When to talk: how many local steps lie between two rounds."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from decentral.part import Part
from decentral.peer import Peer
from decentral.protocols.naming import part_named


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


SCHEDULES: dict[str, type[Schedule]] = {Every.name: Every}


def _schedule(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"must be at least 1 local step, not {value}")
        return Every(period=value)
    return part_named(value, SCHEDULES, Schedule, "schedule")


Period = Annotated[Schedule, BeforeValidator(_schedule)]
"""A field type for rules: a whole number H (a round every H local steps) or a schedule by name."""
