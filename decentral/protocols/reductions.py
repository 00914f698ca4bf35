"""`Reductions`: what the rounds of a rule are, where each is local work and one all-reduce, and nothing else."""

from __future__ import annotations

from typing import NamedTuple

from decentral.protocols.codecs import Codec
from decentral.protocols.collectives import AllReduce
from decentral.protocols.fragments import Cut
from decentral.protocols.schedule import Schedule


class Reductions(NamedTuple):
    """How long the local phases are, and what is reduced after each, how and under which name."""

    period: Schedule
    codec: Codec
    all_reduce: AllReduce
    pieces: Cut | None = None
    """Pieces of the gradient of a phase of one step, each reduced as soon as it is final; None: the whole vector."""
    channel: str = "sync"
    slots: int = 0
    """Buffers as long as the model that a worker keeps beside it."""
