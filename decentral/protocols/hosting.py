"""What goes between workers and a coroutine beside one of them that all others talk to: a server or a syncer."""

from __future__ import annotations

import asyncio
import statistics
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from decentral.errors import PeerGone
from decentral.peer import Peer
from decentral.protocols.codecs import Float32
from decentral.protocols.rounds import NORMS_KEPT, NORMS_NEEDED
from decentral.wire import FrameError, Packet, Tag

GLOBALS = Float32()
"""Global models travel whole: whoever has missed one is right again with the next."""


class Push(NamedTuple):
    """What a worker has pushed to a server: `values` as decoded, float32, ours to change.

    It is what was `assigned` (0: by another server) with the model of that `version` (-1: another server's);
    `staleness` updates and `elapsed_s` seconds have passed since, when the server takes it.
    """

    worker: int
    values: Tensor
    assigned: int
    version: int
    staleness: int
    elapsed_s: float


def host_of(peer: Peer) -> int:
    """Return the member beside which the server runs: of those who came first the lowest.

    A worker that is back is there for as long as it has been back, so it takes nothing from who has served meanwhile.
    """
    came = {worker: place for place, worker in enumerate(peer.everybody.admitted.get("", ()))}
    return min(peer.members, key=lambda worker: (came.get(worker, -1), worker))


def stay_of(peer: Peer, worker: int) -> str:
    """Name the worker's stay in the run, as known now: "3", or "3.1" once it has left, which need not be back yet."""
    gone = peer.everybody.departed.count(worker)
    return f"{worker}.{gone}" if gone else f"{worker}"


def push_channel(host: str, worker: str) -> str:
    """Return the channel on which a worker talks to a server, both named by their stays: nothing old is on it."""
    return f"push {host} {worker}"


def pull_channel(host: str, worker: str) -> str:
    """Return the channel on which a server answers a worker, both named by their stays."""
    return f"pull {host} {worker}"


def knock(host: str) -> Tag:
    """Return the tag by which a newcomer has the server at the stay `host` listen to it."""
    return Tag(f"knock {host}", 0)


def deliver(peer: Peer, to: int, tag: Tag, packet: Packet) -> asyncio.Future[None] | None:
    """Send a packet, or put it into our own mail."""
    if to == peer.id:
        peer.arrived(to, tag, packet)
        return None
    return peer.send(to, tag, packet)


async def hear(
    peer: Peer, source: int, stay: str, tag: Tag, serving: asyncio.Task[None] | None = None
) -> Packet | None:
    """Return the packet, however long its sender takes; None when its `stay` is over, though it may be back.

    Raises what `serving`, which is to send it, has failed with.
    """
    while stay_of(peer, source) == stay:
        try:
            return (await peer.recv(source, tag))[1]
        except TimeoutError:
            if serving is not None and serving.done():
                await serving
        except PeerGone:
            break
    return None


class UsualNorms:
    """The norms of the last pushes, against which each new one is held: at most `limit` times their median; 0: any."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._norms: deque[float] = deque(maxlen=NORMS_KEPT)

    def require(self, values: Tensor) -> None:
        """Take a push in; raises `FrameError` if it is too long."""
        if not self._limit or not isinstance(values, Tensor):  # phantoms have no norm
            return
        norm = float(torch.linalg.vector_norm(values))
        median = statistics.median_low(self._norms) if len(self._norms) >= NORMS_NEEDED else 0.0
        if median and norm > self._limit * median:
            raise FrameError("norm", f"norm {norm:.3g} where {median:.3g} is usual")
        self._norms.append(norm)
