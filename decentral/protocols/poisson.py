"""Gossip in continuous time: meetings along Poisson clocks, and what runs on between them.

Times are in units that a rule chooses. Both ends of an edge draw its times from the same seed, so nobody has to ask.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import random
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from decentral.peer import Peer
from decentral.protocols.edge_rates import Edge
from decentral.replica import seed_of


class Meeting(NamedTuple):
    """Somebody to meet at a time, as the round of that number on a channel of the pair's own."""

    time: float
    other: int
    channel: str
    round: int


class Meetings:
    """One worker's meetings in order of time.

    All workers keep to this order, so that they never wait for each other in a circle: of all meetings that are still
    to come, both ends of the earliest have it as their next.
    """

    def __init__(self, peer: Peer, rates: Mapping[Edge, float]) -> None:
        self._peer, self._rates = peer, rates
        self._ahead: list[tuple[float, Edge, int]] = []
        for edge in rates:
            if peer.id in edge:
                self._draw(edge, 0.0)

    def next(self) -> Meeting | None:
        """Return the next meeting with somebody who is still in the run; None when there is nobody."""
        while self._ahead:
            time, edge, round_ = heapq.heappop(self._ahead)
            other = sum(edge) - self._peer.id
            if other in self._peer.members:
                self._draw(edge, time)
                return Meeting(time, other, _channel(edge), round_)
        return None

    def _draw(self, edge: Edge, since: float) -> None:
        round_ = self._peer.next_round(_channel(edge))
        wait = self._peer.rng(_channel(edge), round_).expovariate(self._rates[edge])
        heapq.heappush(self._ahead, (since + wait, edge, round_))


@functools.lru_cache(maxsize=1024)
def arrivals(seed: int, worker: int, count: int) -> tuple[float, ...]:
    """Return the times of the first `count` events of a worker's own Poisson clock of rate 1."""
    chance = random.Random(seed_of(seed, "arrivals", worker))
    return tuple(itertools.accumulate(chance.expovariate(1.0) for _ in range(count)))


def _channel(edge: Edge) -> str:
    return f"edge {edge[0]}-{edge[1]}"


def flow(model: Tensor, buffer: Tensor, eta: float, elapsed: float) -> None:
    """Let `model` and `buffer` run into each other in place: dx = eta (y - x) dt, dy = eta (x - y) dt, exactly."""
    step = (buffer - model) * (-math.expm1(-2 * eta * elapsed) / 2)
    model.add_(step)
    buffer.sub_(step)
