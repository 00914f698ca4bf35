"""A flow: some bytes on their way between two nodes."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from decentral.sim.clock import Handle

NEVER = math.inf


class Terms(NamedTuple):
    """On what terms flows between two nodes travel, beside the lines that they cross."""

    cap_bps: float = math.inf
    """What one flow gets at most, in bits per second, however empty the lines are."""
    weight: int = 1
    """Its share beside others' where the network's flows are weighted; a whole number, so that sums are exact."""
    times_sent: float = 1.0
    """How often each bit goes over the lines, 1 or more: what is lost is sent again."""


class FlowState(enum.Enum):
    """Where a flow is in its life."""

    SENDING = "sending"
    IN_FLIGHT = "in flight"  # the last byte has left and has not arrived
    DONE = "done"
    CANCELLED = "cancelled"


class Flow:
    """Some bytes on their way between two nodes. Only the network changes it, but for `cargo`, which is the user's."""

    __slots__ = (
        "_arrival",
        "_done",
        "_finish_at",
        "_on_sent",
        "_path",
        "arrived_at",
        "cargo",
        "dst",
        "latency_s",
        "nbytes",
        "number",
        "rate_bps",
        "rated_at",
        "remaining_bits",
        "sent_at",
        "src",
        "started_at",
        "state",
    )

    def __init__(
        self,
        number: int,
        src: int,
        dst: int,
        nbytes: int,
        latency_s: float,
        started_at: float,
        done: Callable[[Flow], object],
        on_sent: Callable[[Flow], object] | None,
    ) -> None:
        self.number = number  # flows are numbered in the order of their start
        self.src = src
        self.dst = dst
        self.nbytes = nbytes
        self.latency_s = latency_s
        self.started_at = started_at  # virtual seconds, like every time below
        self.cargo: Any = None  # whatever its user wants to find on it in `done`
        self.state = FlowState.SENDING
        self.rate_bps = 0.0
        self.rated_at = started_at  # when the rate was last changed
        self.remaining_bits = 8.0 * nbytes  # as it was at `rated_at`; on the lines, with what is sent again
        self.sent_at: float | None = None
        self.arrived_at: float | None = None
        self._path: tuple[int, ...] = ()  # the finite resources that it crosses
        self._finish_at = NEVER
        self._arrival: Handle | None = None
        self._done = done
        self._on_sent = on_sent

    def __repr__(self) -> str:
        return f"<Flow {self.number} {self.src}->{self.dst} {self.nbytes} bytes, {self.state.value}>"
