"""Rules with a server: a coroutine beside the lowest member's worker, which owns the global model.

A worker works on what it was assigned, pushes what came of it, and goes on from the model that comes back. Who comes
back when, and what the server makes of a push, is the rule's business.
"""

from __future__ import annotations

import asyncio
import dataclasses
from abc import abstractmethod

import torch
from torch import Tensor

from decentral.errors import ConfigError
from decentral.peer import Peer
from decentral.protocols.codecs import Codec, Float32
from decentral.protocols.hosting import GLOBALS, deliver, hear, host_of, knock, pull_channel, push_channel, stay_of
from decentral.protocols.rule import SyncRule
from decentral.protocols.schedule import FixedPeriod
from decentral.protocols.server import Server
from decentral.protocols.unsent import coder_of
from decentral.wire import SIGNAL, FrameError, Packet, Tag, largest_packet, signal


class ServerRule(SyncRule):
    """A rule whose workers talk to a server alone.

    The server is a coroutine beside the lowest member's worker. If that dies, the next lowest member serves on, once
    its own phase is over, from the model it pulled last, with no momentum; a push that the dead server may have applied
    is not sent again, so none is applied twice. The server's worker stays until nobody has anything more to push; then
    everybody is sent the model that it came to, so that all replicas end equal. Models travel in float32.

    A newcomer pulls the server's newest model and goes on from that. Whoever came last serves last, so a worker that is
    back leaves the server where it is. One that comes when the server has ended does its last steps alone.
    """

    codec: Codec = Float32()
    """How pushes travel."""

    @property
    def vectors(self) -> int:
        """Vectors `[P]` in a push, and models in what comes back, of which the last is the newest."""
        return 1

    def push_codec(self, peer: Peer) -> Codec:
        """Return the codec as it is for this peer's pushes."""
        whole = ((0, peer.layout.size),) * self.vectors
        return self.codec.fit(peer.layout.shapes(whole)) if self.codec.shaped else self.codec

    def check(self, workers: int) -> None:
        """Refuse codecs that need the same participants in every round."""
        if self.codec.same_participants:
            raise ConfigError(
                f"rule.codec: '{self.codec.spelling()}' is for means over the same workers in every round, and here "
                "each worker pushes by itself; take 'error_feedback' around the codec inside"
            )

    def check_own_loop(self, *, norms: bool, endless: bool) -> None:
        super().check_own_loop(norms=norms, endless=endless)
        if endless:
            raise ConfigError(
                f"steps: missing; under '{self.spelling()}' the server goes by the local steps that are left: say how "
                "many there are, and have every loop do as many"
            )

    def check_leases(self, bounded: bool) -> None:
        """Refuse also a stream that ends: the server sends workers out by the steps that they have left."""
        super().check_leases(bounded)
        if bounded:
            raise ConfigError(
                f"epochs: the server of rule '{self.spelling()}' plans by local steps; leave epochs out and give steps"
            )

    async def run(self, peer: Peer) -> None:
        peer.largest_packet = largest_packet(self.vectors * peer.layout.size)
        link = _Link(self, peer)
        assigned = await link.begin()
        while (update := await self.work(peer, link.anchor, assigned)) is not None:
            assigned = await link.exchange(update)
        await link.end()

    @abstractmethod
    def first_assignment(self) -> int:
        """Return what every worker is assigned at the beginning, at least 1."""

    def next_assignment(self, server: Server, worker: int) -> int:
        """Return what a worker shall do now, such as one whose push was lost; 0: nothing until the run ends."""
        return self.first_assignment()

    @abstractmethod
    async def work(self, peer: Peer, anchor: Tensor, assigned: int) -> Tensor | None:
        """Do what was assigned; return what to push, as long as `anchor`, or None when the budget is spent.

        `anchor` is what the server sent last: `vectors` models one after the other.
        """

    @abstractmethod
    async def serve(self, server: Server) -> None:
        """Take pushes, change `server.model`, and dispatch workers again, until no push can come any more."""


class LocalStepsRule(ServerRule):
    """A rule whose workers push what local steps changed: the model that they began with, less their parameters."""

    period: FixedPeriod = 50
    """Local steps before a push (H)."""

    def first_assignment(self) -> int:
        return self.period

    async def work(self, peer: Peer, anchor: Tensor, assigned: int) -> Tensor | None:
        return anchor - peer.params if await peer.train(assigned) else None


class _Link:
    """A worker's line to whoever serves."""

    def __init__(self, rule: ServerRule, peer: Peer) -> None:
        self._rule, self._peer = rule, peer
        self.anchor = peer.slot("anchor", torch.cat([peer.params] * rule.vectors))
        codec = rule.push_codec(peer)
        self._coder = coder_of(peer, codec, "push", lambda: peer.members)
        self._serving: asyncio.Task[None] | None = None
        self._newcomer = peer.id in peer.everybody.admitted.get("", ())
        self._knocked: set[str] = set()  # at these hosts' stays
        self._host(first=not self._newcomer)

    def _host(self, *, first: bool = False) -> int:
        """Return the host, and begin to serve if that is us; `first`: nobody has served before."""
        host = host_of(self._peer)
        if host == self._peer.id and self._serving is None:
            self._serving = self._peer.spawn(Server(self._rule, self._peer, self.anchor, first=first).serve())
        return host

    async def begin(self) -> int:
        """Return what is assigned first; a newcomer takes the server's model, and asks."""
        if not self._newcomer or not self._peer.steps_left:
            return self._rule.first_assignment()
        return (await self._pull(signal("pull")))[0]

    async def exchange(self, update: Tensor) -> int:
        """Push, and take the model that comes back into anchor and parameters; return what is assigned next."""
        peer, began = self._peer, self._peer.step
        packet = self._coder.encode(update)
        peer.hands_in("push", began)
        assigned, used = await self._pull(packet)
        peer.handed_in("push", began, used=used)
        if used:
            self._coder.commit()
        else:
            self._coder.undo()
        return assigned

    async def _pull(self, packet: Packet) -> tuple[int, bool]:
        """Send a packet and take the model that comes back; return what is assigned next, and whether a push was used.

        A push that a dead server may have applied is not sent again.
        """
        peer = self._peer
        while True:
            host, used = self._host(), packet.codec != SIGNAL
            theirs, ours = stay_of(peer, host), stay_of(peer, peer.id)
            if self._newcomer and theirs not in self._knocked:
                self._knocked.add(theirs)
                deliver(peer, host, knock(theirs), signal(""))
            number = peer.next_round(push_channel(theirs, ours))
            packet = dataclasses.replace(packet, weight=peer.step + 1)  # which is above 0, as weights are
            deliver(peer, host, Tag(push_channel(theirs, ours), number), packet)
            reply = await hear(peer, host, theirs, Tag(pull_channel(theirs, ours), number), self._serving)
            if reply is not None:
                break
            packet = signal("pull")
        peer.close(pull_channel(theirs, ours), number)
        try:
            self.anchor.copy_(GLOBALS.decode(reply, self.anchor))
        except FrameError as error:
            peer.refuse(host, error)
        peer.params.copy_(self.anchor[-peer.layout.size :])
        return reply.weight, used

    async def end(self) -> None:
        """Stay until nobody needs us as a server."""
        if self._serving is not None:
            await self._serving
