"""What a run without messages comes to."""

from __future__ import annotations

from typing import NamedTuple

from decentral.sim.lean.timetable import Timetable
from decentral.traffic import Traffic


class Timed(NamedTuple):
    """What a run came to: its records, its length in virtual seconds, and what its network carried."""

    records: Timetable
    seconds: float
    traffic: Traffic


class Unforeseen(Exception):
    """Something happens that takes messages, such as somebody who waits for longer than the run's patience."""
