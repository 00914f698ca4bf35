"""Runs whose rounds are exchanges or all-reduces, timed without coroutines: the times of messages, much sooner."""

from decentral.sim.lean.choice import timed
from decentral.sim.lean.timed import Timed

__all__ = ["Timed", "timed"]
