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
from decentral.protocols.codecs import Codec, CodecField, Coder, Float32
from decentral.protocols.hosting import GLOBALS, deliver, hear, pull_channel, push_channel
from decentral.protocols.rule import SyncRule
from decentral.protocols.schedule import FixedPeriod
from decentral.protocols.server import Server
from decentral.wire import SIGNAL, FrameError, Tag, signal


class ServerRule(SyncRule):
    """A rule whose workers talk to a server alone.

    The server is a coroutine beside the lowest member's worker. If that dies, the next lowest member serves on, once
    its own phase is over, from the model it pulled last, with no momentum; a push that the dead server may have applied
    is not sent again, so none is applied twice. The server's worker stays until nobody has anything more to push; then
    everybody is sent the model that it came to, so that all replicas end equal. Models travel in float32.
    """

    codec: CodecField = Float32()
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

    async def run(self, peer: Peer) -> None:
        link = _Link(self, peer)
        assigned = self.first_assignment()
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
        self._coder = codec.coder(lambda name, like: peer.slot(f"push.{name}", like)) or Coder(codec)
        self._serving: asyncio.Task[None] | None = None
        self._host()

    def _host(self) -> int:
        """Return the lowest member, and begin to serve if that is us."""
        host = min(self._peer.members)
        if host == self._peer.id and self._serving is None:
            self._serving = self._peer.spawn(Server(self._rule, self._peer, self.anchor).serve())
        return host

    async def exchange(self, update: Tensor) -> int:
        """Push, and take the model that comes back into anchor and parameters; return what is assigned next."""
        peer = self._peer
        packet, used = self._coder.encode(update), False
        while True:
            host, lost = self._host(), packet.codec == SIGNAL
            number = peer.next_round(push_channel(host, peer.id))
            packet = dataclasses.replace(packet, weight=peer.step + 1)  # which is above 0, as weights are
            deliver(peer, host, Tag(push_channel(host, peer.id), number), packet)
            reply = await hear(peer, host, Tag(pull_channel(host), number), self._serving)
            if reply is not None:
                used = not lost
                break
            packet = signal("pull")
        if used:
            self._coder.commit()
        else:
            self._coder.undo()
        peer.close(pull_channel(host), number)
        try:
            self.anchor.copy_(GLOBALS.decode(reply, self.anchor))
        except FrameError as error:
            peer.refuse(host, error)
        peer.params.copy_(self.anchor[-peer.layout.size :])
        return reply.weight

    async def end(self) -> None:
        """Stay until nobody needs us as a server."""
        if self._serving is not None:
            await self._serving
