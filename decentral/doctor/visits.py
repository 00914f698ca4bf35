"""Visits from node to node, over gRPC as workers talk: who answers, how soon, how much a second, and at what time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import msgpack

from decentral import profile
from decentral.doctor.check import Seen
from decentral.doctor.post import CLOCK, LOOK, SERVICE
from decentral.errors import RunError
from decentral.workers import rpc
from decentral.workers.tuned import grpc

ANSWER_S = 60.0
"""Seconds that a node has to say what it sees, writing to a slow disk included, and for a chunk over a thin link."""
REACH_S = 5.0
"""Seconds that a node has to answer at all."""
PINGS = 10


@dataclass(frozen=True, slots=True)
class Visit:
    """What a visit from one node to another came to: an `error`, or the rest.

    `latency_s` is half of the shortest round trip. The other's clock is ahead of ours by `ahead_s`, give or take
    `latency_s`, for nobody knows how much of a trip was there and how much back (Cristian 1989). `bps` is None where
    nothing was sent to measure it.
    """

    source: str
    target: str
    error: str = ""
    latency_s: float = 0.0
    ahead_s: float = 0.0
    bps: float | None = None
    seen: dict[str, Seen] = field(default_factory=dict)


async def visit(source: str, target: str, address: str, keys: rpc.Keys, *, measure: bool) -> Visit:
    """Go to the post at the address (host:port); with `measure` send it packets for some seconds."""
    channel = rpc.dial(address, keys)
    try:
        trips = [await _trip(channel, keys) for _ in range(1 + PINGS)][1:]  # the first one dials
        found = msgpack.unpackb(await _ask(channel, LOOK, keys, ANSWER_S))
        bps = None
        if measure:
            bps = (await profile.measure_link(found["packets"], keys, ANSWER_S)).bps
    except grpc.aio.AioRpcError as error:
        return Visit(source, target, f"{address} does not answer: {_reason(error)}")
    except RunError as error:
        return Visit(source, target, f"no packet gets to {found['packets']}, one of its free ports: {error.__cause__}")
    finally:
        await channel.close()
    latency_s, ahead_s = min(trips)
    return Visit(source, target, "", latency_s, ahead_s, bps, found["seen"])


async def _ask(channel: Any, method: str, keys: rpc.Keys, timeout_s: float) -> bytes:
    call = channel.unary_unary(f"/{SERVICE}/{method}")
    answer: bytes = await call(b"", metadata=keys.metadata, timeout=timeout_s)
    return answer


async def _trip(channel: Any, keys: rpc.Keys) -> tuple[float, float]:
    """Return half of how long a call took, and how far the other's clock is ahead of ours, in seconds."""
    began, ticks = time.time(), time.perf_counter()
    theirs: float = msgpack.unpackb(await _ask(channel, CLOCK, keys, REACH_S))
    half_s = (time.perf_counter() - ticks) / 2
    return half_s, theirs - (began + half_s)


def _reason(error: grpc.aio.AioRpcError) -> str:
    if error.code() == grpc.StatusCode.UNAUTHENTICATED:
        return "it has another secret"
    if error.code() == grpc.StatusCode.UNIMPLEMENTED:
        return "what listens there is no doctor"
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return "no answer in time"
    return str(error.details() or error.code().name)
