"""Stochastic gradient push: gossip on directed graphs, where nobody waits for an answer."""

from __future__ import annotations

import asyncio

import torch
from torch import Tensor

from decentral.errors import PeerGone
from decentral.peer import Peer
from decentral.protocols.codecs import Codec, Float32
from decentral.protocols.collectives import require_dense
from decentral.protocols.graphs import Exponential
from decentral.protocols.rule import SyncRule
from decentral.protocols.schedule import Every, Schedule
from decentral.protocols.topology import Links, Topology, require_two
from decentral.wire import FrameError, Packet, Tag

UNIT = 1 << 40
"""The mass a worker begins with. Masses are whole numbers, so that their sum over the workers is exact."""
LATE_ROUNDS = 64
"""Rounds for which a parcel that has not come is still looked for."""


class SGP(SyncRule):
    """Every H local steps each worker gives equal shares of its numerator x and its mass w away, and trains at x / w.

        x_i <- x_i + (z_i after H local steps - z_i);   (x_i, w_i) <- sum_j p_ij (x_j, w_j);   z_i <- x_i / w_i

    Assran et al., arXiv 1811.10792, algorithm 1, from memory of the paper: push-sum with p_ij = 1 / (1 + those j sends
    to) over the one-peer exponential graph. Columns of p sum to one, so x and w are conserved, and z comes to the mean
    on any directed graph that leads from everybody to everybody. What was sent to a worker that died is taken back;
    what comes too late for its round is added in a later one. Who dies takes its share of x and of w alike, which
    biases nobody. The sender keeps what a codec loses.
    """

    name = "sgp"
    rests = True
    other_memory = "the mass that goes with their numerators"
    unaccountable = "nobody confirms that it has taken up what it was given"
    period: Schedule = Every(period=1)
    """Local steps between rounds (H)."""
    topology: Topology = Exponential(one_peer=True)
    """Who sends to whom in a round."""
    codec: Codec = Float32()
    """How numerators travel; masses are exact."""

    def check(self, workers: int) -> None:
        require_two(workers, self.name)
        require_dense(self.codec)
        self.topology.check(workers)

    async def run(self, peer: Peer) -> None:
        post = _Post(peer, self)
        while True:
            began = peer.params.clone()
            if not await peer.train(self.period.steps(peer)):
                return
            post.numerator.add_(peer.params - began)
            links = self.topology.links(peer, round_ := peer.next_round("push"))
            post.give(links, round_)
            heard = await post.take(links, round_)
            whole = len(heard) == len(links.source)
            peer.ended_round("push", round_, "committed" if whole else "degraded", sorted([peer.id, *heard]))
            peer.params.copy_(post.numerator).mul_(UNIT / post.mass)


class _Post:
    """One worker's numerator and mass, and its parcels on the way. A parcel is a share of both."""

    def __init__(self, peer: Peer, rule: SGP) -> None:
        self._peer, self._codec = peer, rule.codec
        self._held = peer.slot("mass", torch.tensor([UNIT], dtype=torch.float64))
        self._due: list[tuple[int, int]] = []  # (source, round) of parcels that have not come
        self._returned: list[tuple[Tensor, int]] = []
        self._deaths = 0
        self._known: set[int] = set(peer.cohort)  # who sends to us, as we have seen since the last death
        self.numerator = peer.slot("numerator", peer.params)
        self.mass = int(self._held.item()) if isinstance(self._held, Tensor) else UNIT  # a phantom knows no number

    def give(self, links: Links, round_: int) -> None:
        """Send a share to each of `links.to`, and keep one."""
        share = self.mass // (1 + len(links.to))
        packet = self._codec.encode(self.numerator * (share / self.mass))
        packet.weight = share
        parcel = self._codec.decode(packet, self.numerator)
        for to in links.to:
            self._add(-parcel, -share)
            self._peer.send(to, Tag("parcel", round_), packet).add_done_callback(
                lambda sent: self._returned.append((parcel, share)) if _failed(sent) else None
            )

    async def take(self, links: Links, round_: int) -> list[int]:
        """Add what comes in this round, what is late from earlier ones, and what could not be delivered.

        Returns who was heard of this round. Waits for the run's patience at most. A death may change the graph, and the
        others may hear of it some rounds sooner or later: until a source has sent once more nobody waits for it.
        """
        members = self._peer.members
        deaths = members.epoch - len(members.finished)
        if deaths > self._deaths:
            self._deaths = deaths
            self._known.clear()
        late, self._due = self._due, []
        for source, since in late:
            if round_ - since <= LATE_ROUNDS:
                await self._receive(source, since, 0.0)
        deadline = self._peer.now() + self._peer.patience_s
        heard = []
        for source in links.source:
            patience_s = deadline - self._peer.now() if source in self._known else 0.0
            if await self._receive(source, round_, patience_s):
                heard.append(source)
        while self._returned:
            self._add(*self._returned.pop())
        self._held.fill_(self.mass)
        return heard

    async def _receive(self, source: int, round_: int, timeout_s: float) -> bool:
        try:
            _, packet = await self._peer.recv(source, Tag("parcel", round_), timeout_s)
            self._known.add(source)
            self._add(self._opened(packet), packet.weight)
        except PeerGone:
            return False
        except TimeoutError:
            self._due.append((source, round_))
            return False
        except FrameError as error:
            self._peer.refuse(source, error)
            return False
        return True

    def _opened(self, packet: Packet) -> Tensor:
        if packet.weight > UNIT * len(self._peer.cohort):
            raise FrameError("header", f"a mass of {packet.weight}: more than there is in the run")
        return self._codec.decode(packet, self.numerator)

    def _add(self, numerator: Tensor, mass: int) -> None:
        self.numerator.add_(numerator)
        self.mass += mass


def _failed(sent: asyncio.Future[None]) -> bool:
    return sent.cancelled() or sent.exception() is not None
