"""Runs whose rounds are exchanges, timed without coroutines: the times of messages, several times as fast."""

from decentral.sim.lean.exchanges import Timed, timed

__all__ = ["Timed", "timed"]
