"""With whom, where it stays the same from round to round: graphs over the workers."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Sequence

from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols.topology import TOPOLOGIES, Links, Topology, both_ways


class Graph(Topology):
    """A graph of two-way links that stays the same as long as nobody dies, with Metropolis weights.

        w_ij = 1 / (1 + max(links of i, links of j))

    These keep the mean although degrees differ (Xiao and Boyd, Systems & Control Letters 53, 2004). Who has finished
    keeps its place: its weight falls to its neighbours themselves.
    """

    def links(self, peer: Peer, round_: int) -> Links:
        return both_ways(_here(peer, self.neighbours(peer.id, _in_order(peer))))

    def weights(self, peer: Peer, links: Links) -> dict[int, float]:
        ids = _in_order(peer)
        mine = len(self.neighbours(peer.id, ids))
        return {worker: 1 / (1 + max(mine, len(self.neighbours(worker, ids)))) for worker in links.source}


class Ring(Graph):
    """Each worker with its two neighbours in ascending order, the last beside the first."""

    name = "ring"

    def neighbours(self, worker: int, ids: Sequence[int]) -> set[int]:
        place = bisect_left(ids, worker)
        return {ids[place - 1], ids[(place + 1) % len(ids)]} - {worker}


class Torus(Graph):
    """Rows and columns that close to rings, as square as the number of workers allows; a prime number makes a ring."""

    name = "torus"

    def neighbours(self, worker: int, ids: Sequence[int]) -> set[int]:
        count, place = len(ids), bisect_left(ids, worker)
        columns = count // max(rows for rows in range(1, math.isqrt(count) + 1) if count % rows == 0)
        row = place - place % columns
        around = (place + columns, place - columns, row + (place + 1) % columns, row + (place - 1) % columns)
        return {ids[neighbour % count] for neighbour in around} - {worker}


class Edges(Graph):
    """Two-way links that are named one by one. Those of a worker that dies are gone, and nothing closes the gap."""

    name = "edges"
    edges: tuple[tuple[int, int], ...]
    """Pairs of workers."""

    def neighbours(self, worker: int, ids: Sequence[int]) -> set[int]:
        others = {b if a == worker else a for a, b in self.edges if worker in (a, b)}
        return {other for other in others if other in ids}

    def check(self, workers: int) -> None:
        for place, (a, b) in enumerate(self.edges):
            if a == b or not 0 <= min(a, b) <= max(a, b) < workers:
                raise ConfigError(
                    f"rule.topology.edges.{place}: ({a}, {b}) must be two different workers of 0 to {workers - 1}"
                )
        reached, ahead = {0}, deque([0])
        while ahead:
            ahead.extend(new := self.neighbours(ahead.popleft(), range(workers)) - reached)
            reached |= new
        if len(reached) < workers:
            lost = min(set(range(workers)) - reached)
            raise ConfigError(f"rule.topology.edges: no way leads from worker 0 to worker {lost}; add an edge")


class Exponential(Topology):
    """The directed exponential graph: worker i sends to i + 1, i + 2, i + 4, ... (mod N).

    With `one_peer` a round uses one of these offsets after the other, so each worker sends and hears once a round.
    Assran et al., Stochastic Gradient Push, arXiv 1811.10792; Ying et al., arXiv 2110.13363.
    """

    name = "exponential"
    one_peer: bool = False
    """Use one offset a round, in turn."""

    def links(self, peer: Peer, round_: int) -> Links:
        ids = _in_order(peer)
        place = bisect_left(ids, peer.id)
        offsets = _powers(len(ids))
        if self.one_peer and offsets:
            offsets = [offsets[(round_ - 1) % len(offsets)]]
        to = {ids[(place + offset) % len(ids)] for offset in offsets}
        source = {ids[(place - offset) % len(ids)] for offset in offsets}
        return Links(_here(peer, to), _here(peer, source))

    def neighbours(self, worker: int, ids: Sequence[int]) -> set[int]:
        place = bisect_left(ids, worker)
        return {ids[(place + sign * power) % len(ids)] for power in _powers(len(ids)) for sign in (1, -1)}


def _powers(count: int) -> list[int]:
    """Return 1, 2, 4, ... below `count`."""
    return [1 << power for power in range((count - 1).bit_length())]


def _in_order(peer: Peer) -> Sequence[int]:
    """Return the workers among which a fixed graph is drawn: the dead leave a gap that closes, the finished do not.

    A worker that is done leaves while slower ones have rounds to go; when they hear of it must not change their links.
    """
    members = peer.members
    return sorted((*members.ids, *members.finished)) if members.finished else members.ids


def _here(peer: Peer, workers: Collection[int]) -> tuple[int, ...]:
    """Return those of the workers that are in the run, in ascending order."""
    return tuple(sorted(worker for worker in workers if worker in peer.members))


TOPOLOGIES.update({cls.name: cls for cls in (Ring, Torus, Exponential, Edges)})
