"""`Exchanges`: what the rounds of a rule are, where each is a local phase and one exchange, and nothing else."""

from __future__ import annotations

from typing import NamedTuple

from decentral.protocols.codecs import Codec
from decentral.protocols.schedule import Schedule
from decentral.protocols.topology import Topology


class Exchanges(NamedTuple):
    """How long the local phases are, and with whom, how and under which name the exchange after each goes."""

    period: Schedule
    topology: Topology
    codec: Codec
    channel: str = "pair"
    part: str = "x"
    slots: int = 0
    """Buffers as long as the model that a worker keeps beside it."""
