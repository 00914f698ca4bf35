"""The simulated world: what a `Peer` meets when time is virtual."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

import numpy as np

from decentral.errors import PeerGone
from decentral.fleet import Fleet
from decentral.journal import Record
from decentral.members import Ballot, Decision, Members, Roster
from decentral.peer import Peer
from decentral.protocols import SyncRule
from decentral.replica import BatchId, Spans, seed_of
from decentral.sim.clock import VirtualLoop
from decentral.sim.network import Flow, Network
from decentral.wire import HeaderSizes, Packet, Tag

T = TypeVar("T")

FORWARD_SHARE = 1 / 3
"""The forward pass's share of a local step; the backward pass costs twice as much."""


_Cargo = tuple[Peer, Peer, Tag, Packet, "asyncio.Future[None]"]
"""What a flow carries: source, target, tag, packet, and the future that is done when it has arrived."""


class SimWorld:
    """Workers that share a virtual loop, a network and a roster."""

    def __init__(self, loop: VirtualLoop, fleet: Fleet, seed: int, record: Callable[[Record], None]) -> None:
        self._loop = loop
        self._fleet = fleet
        self._groups = fleet.each()
        self._chance = [np.random.default_rng(seed_of(seed, "jitter", worker)) for worker in range(fleet.size)]
        self._network = Network(
            loop,
            up_bps=[group.up_bps or fleet.up_bps for group in self._groups],
            down_bps=[group.down_bps or fleet.down_bps for group in self._groups],
            latency_s=lambda _source, _to: fleet.latency_s,
        )
        self._roster = Roster(tuple(range(fleet.size)), self._changed)
        self._gone: list[int] = []
        self._peers: dict[int, Peer] = {}
        self._mains: dict[int, asyncio.Task[None]] = {}
        self._headers = HeaderSizes()
        self._unsent: list[int] = [0] * fleet.size
        self._drained: dict[int, asyncio.Future[None]] = {}
        self.record = record

    @property
    def members(self) -> Members:
        return self._roster.members

    @property
    def network(self) -> Network:
        return self._network

    # -- the life of workers ---------------------------------------------------------------------------------------

    async def run(self, peers: Sequence[Peer], rule: SyncRule) -> None:
        """Run the rule on every peer to its end; raises what a worker raised, such as `TaskError`."""
        self._peers = {peer.id: peer for peer in peers}
        self._mains = {peer.id: self._loop.create_task(self._live(peer, rule)) for peer in peers}
        for event in self._fleet.events:
            self._loop.call_at(event.at_s, self._crash, event.worker)
        try:
            await asyncio.gather(*self._mains.values())
        finally:
            for main in self._mains.values():
                main.cancel()

    async def _live(self, peer: Peer, rule: SyncRule) -> None:
        try:
            await peer.run(rule.run)
            if self._unsent[peer.id]:
                self._drained[peer.id] = self._loop.create_future()
                await self._drained[peer.id]
        except asyncio.CancelledError:
            if peer.id in self._peers:
                raise
            return  # crashed, and `_crash` has said so
        except PeerGone as error:
            self._leave(peer, str(error))
            return
        self._leave(peer, "finished")

    def _leave(self, peer: Peer, reason: str) -> None:
        self.record(peer.left(reason))
        del self._peers[peer.id]
        self._roster.remove(peer.id, finished=reason == "finished")

    def _crash(self, worker: int) -> None:
        peer = self._peers.pop(worker, None)
        if peer is None:
            return
        self._mains[worker].cancel()
        for flow in self._network.cancel_node(worker):
            self._lose(flow, worker)
        self.record(peer.left("crashed"))
        self._loop.call_later(self._fleet.detection_s, self._roster.remove, worker)

    def _changed(self, members: Members, gone: int) -> None:
        """Tell everybody once an instant: a thousand workers may finish together."""
        if not self._gone:
            self._loop.at_instant_end(self._tell)
        self._gone.append(gone)

    def _tell(self) -> None:
        gone, self._gone = self._gone, []
        for peer in list(self._peers.values()):
            peer.changed(self._roster.members, gone)

    # -- the World port --------------------------------------------------------------------------------------------

    async def compute(self, peer: Peer, steps: float, work: Callable[[], T]) -> T:
        """Let `steps` local steps' worth of virtual time pass, then really do the work, in no virtual time."""
        if steps:
            await self._loop.sleep(self._duration(peer.id, steps))
        return work()

    async def aside(self, work: Callable[[], T]) -> T:
        """Do the work, in no virtual time."""
        return work()

    async def backward(self, peer: Peer, fragments: Sequence[Spans], batch: BatchId) -> AsyncIterator[int]:
        """Forward first; then fragments become final one after the other, each after its share of the elements."""
        duration = self._duration(peer.id, 1)
        await self._loop.sleep(FORWARD_SHARE * duration)
        order: list[int] = []
        peer.backward_done(peer.replica.backward(batch.step, fragments, order.append, batch.worker))
        for index in order:
            share = sum(stop - start for start, stop in fragments[index]) / peer.layout.size
            await self._loop.sleep((1 - FORWARD_SHARE) * duration * share)
            yield index

    def send(self, peer: Peer, to: int, tag: Tag, packet: Packet) -> asyncio.Future[None]:
        """Start a flow of the frame's bytes; the packet arrives when its last byte does."""
        future: asyncio.Future[None] = self._loop.create_future()
        target = self._peers.get(to)
        if target is None:
            future.set_exception(PeerGone(f"worker {to} is not in the run"))
            future.exception()  # whoever did not await it has nothing to be told
            return future
        nbytes = self._headers.size(peer.id, tag, packet) + packet.nbytes
        peer.meter.sent(nbytes)
        peer.meter.begin_transfer()
        target.meter.begin_transfer()
        self._unsent[peer.id] += 1
        self._network.transfer(peer.id, to, nbytes, self._arrive).cargo = (peer, target, tag, packet, future)
        return future

    def _arrive(self, flow: Flow) -> None:
        cargo: _Cargo = flow.cargo
        source, target, tag, packet, arrived = cargo
        target.meter.received_bytes += flow.nbytes
        target.arrived(source.id, tag, packet)
        self._end_transfer(source, target)
        if not arrived.done():
            arrived.set_result(None)

    def _lose(self, flow: Flow, crashed: int) -> None:
        cargo: _Cargo = flow.cargo
        source, target, _tag, _packet, arrived = cargo
        self._end_transfer(source, target)
        if not arrived.done():
            arrived.set_exception(PeerGone(f"worker {crashed} crashed"))
            arrived.exception()

    def _end_transfer(self, source: Peer, target: Peer) -> None:
        source.meter.end_transfer()
        target.meter.end_transfer()
        self._unsent[source.id] -= 1
        drained = self._drained.get(source.id)
        if drained is not None and not self._unsent[source.id] and not drained.done():
            drained.set_result(None)

    async def vote(self, peer: Peer, ballot: Ballot) -> Decision:
        """Vote at the roster, one latency away; the answer takes another one. Its bytes are not worth counting."""
        answer: asyncio.Future[Decision] = self._loop.create_future()

        def decided(decision: Decision) -> None:
            self._loop.call_later(self._fleet.latency_s, self._hand_over, answer, decision)

        await self._loop.sleep(self._fleet.latency_s)
        self._roster.vote(ballot, decided)
        return await answer

    def _hand_over(self, answer: asyncio.Future[Decision], decision: Decision) -> None:
        if not answer.done():
            answer.set_result(decision)

    def _duration(self, worker: int, steps: float) -> float:
        seconds = steps * self._fleet.step_time_s / self._groups[worker].speed
        sigma = self._fleet.jitter
        if sigma:
            whole = max(1, round(steps))
            factors = self._chance[worker].lognormal(-sigma * sigma / 2, sigma, whole)  # of mean 1, one a step
            seconds *= float(np.add.reduce(factors)) / whole
        return seconds
