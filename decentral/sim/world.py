"""The simulated world: what a `Peer` meets when time is virtual."""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from itertools import islice
from typing import Any, TypeVar

from decentral.accounts import STOPPED
from decentral.errors import PeerGone
from decentral.fleet import Event, Fleet
from decentral.fleet.happenings import happenings, happenings_until, starters
from decentral.grid import WHOLE, Grid
from decentral.journal import Record
from decentral.leases import Grant, LeaseBook, Request
from decentral.members import Ballot, Decision, Members, Roster, cohort_of
from decentral.peer import PREEMPTED, Crowd, Peer
from decentral.protocols import SyncRule
from decentral.protocols.joining import Host, entering, host_for
from decentral.replica import BatchId, Spans
from decentral.sim.clock import Handle, VirtualLoop
from decentral.sim.durations import Durations
from decentral.sim.layerwise import FORWARD_SHARE, LayerwisePhases
from decentral.sim.links import Links
from decentral.sim.network import Flow, Network
from decentral.sim.watch import UNWATCHED, SiteTally, Watch, WatchedNetwork
from decentral.traffic import Traffic
from decentral.wire import HeaderSizes, Packet, Tag

T = TypeVar("T")

_Cargo = tuple[Peer, Peer, Tag, Packet, "asyncio.Future[None]"]
"""What a flow carries: source, target, tag, packet, and the future that is done when it has arrived."""


class _Phase:
    """Local steps under way that may be interrupted: how many, since when, and what is done when they end."""

    def __init__(self, loop: VirtualLoop, steps: int) -> None:
        self._loop = loop
        self.steps, self.began_s = steps, loop.time()
        self.ended: asyncio.Future[None] = loop.create_future()
        self._timer: Handle | None = None

    def last(self, seconds: float) -> None:
        """Let them end so many seconds after they began, and at no other time."""
        self.cancel()
        self._timer = self._loop.call_at(self.began_s + seconds, self._end)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


class SimWorld:
    """Workers that share a virtual loop, a network and a roster, and, if there is a `book`, a stream of samples."""

    def __init__(
        self,
        loop: VirtualLoop,
        fleet: Fleet,
        seed: int,
        record: Callable[[Record], None],
        watch: Watch = UNWATCHED,
        book: LeaseBook | None = None,
        grid: Grid = WHOLE,
    ) -> None:
        self._loop = loop
        self._fleet = fleet
        self._seed = seed
        last_listed_s = max((event.at_s for event in fleet.events), default=-1.0)
        self._listed = happenings_until(fleet, seed, last_listed_s)
        self._later = islice(happenings(fleet, seed), len(self._listed), None)
        self._duration = Durations(fleet, seed, self._listed, loop.time)
        self._links = Links(fleet, seed, loop.time)
        codes_bps = [group.coding_bps or fleet.coding_bps or math.inf for group in fleet.each()]
        self._coding_s = [32 / bps for bps in codes_bps]  # for each element
        self._coding_until_s = [0.0] * fleet.size  # when each worker has coded all that it was given
        self._unrest_s = [event.at_s for event in self._listed if event.kind in ("preempt", "join")]
        self._next_s = math.inf  # when the first of those that are not listed comes
        self._restless = set[Peer]()  # who must leave, or has come
        self._phases: dict[Peer, _Phase] = {}  # under way, of those that may be interrupted
        self._network = watch.network(fleet.sites(), loop, **self._links.options())
        self._cohort = cohort_of(fleet.size)
        self._roster = Roster(self._cohort.ids, self._changed, absent=set(self._cohort) - starters(fleet))
        self.crowd = Crowd(self._roster.members)
        self._untold = False
        self._away_until_s = 0.0  # the coordinator, before this
        self._line_shares: defaultdict[int, list[float]] = defaultdict(list)  # what is left of each worker's line
        self._peers: dict[int, Peer] = {}
        self._mains: dict[int, asyncio.Task[None]] = {}
        self._hosts: dict[int, int] = {}  # whom newcomers were told to ask
        self._headers = HeaderSizes()
        self._unsent: list[int] = [0] * fleet.size
        self._drained: dict[int, asyncio.Future[None]] = {}
        self._sites = SiteTally(fleet.sites())
        self._write, self._book, self._grid = record, book, grid
        self.record = record if book is None else self._record_and_book
        self.layerwise = LayerwisePhases(loop, self._duration) if fleet.layerwise else None

    @property
    def members(self) -> Members:
        return self._roster.members

    @property
    def cohort(self) -> Members:
        """All who may ever be in the run."""
        return self._cohort

    @property
    def fleet(self) -> Fleet:
        """The machines, with the step times of those that are devices."""
        return self._fleet

    @property
    def network(self) -> Network:
        return self._network

    def traffic(self) -> Traffic:
        """Return what the network has carried so far."""
        network, links = self._network, self._links
        traffic = Traffic(links.up_bps, links.down_bps, network.bytes_sent, network.bytes_received, self._sites.nbytes)
        if isinstance(network, WatchedNetwork):
            network.report(traffic)
        return traffic

    # -- the life of workers ---------------------------------------------------------------------------------------

    async def run(self, make: Callable[[int], Peer], rule: SyncRule) -> None:
        """Run the rule on every worker to its end; raises what a worker raised, such as `TaskError`.

        `make(worker)` makes a peer for the worker, whenever it comes. The run is over when nobody is in it.
        """
        self._make, self._rule = make, rule
        self._over = self._loop.create_future()
        for worker in self._roster.members:
            self._begin(make(worker), rule.run)
        for event in self._listed:
            self._loop.call_at(event.at_s, self._befall, event)
        self._follow()
        try:
            await self._over
        finally:
            for main in self._mains.values():
                main.cancel()
            await asyncio.gather(*self._mains.values(), return_exceptions=True)

    def stop(self) -> None:
        """End the run now: whoever is in it leaves."""
        for worker in sorted(self._peers):
            peer = self._peers.pop(worker)
            self._mains[worker].cancel()
            peer.stop()
            self.record(peer.left(STOPPED))
        if not self._over.done():
            self._over.set_result(None)

    def _begin(self, peer: Peer, rule: Callable[[Peer], Coroutine[Any, Any, None]]) -> None:
        self._peers[peer.id] = peer
        self._coding_until_s[peer.id] = 0.0
        if self._fleet.brings_newcomers:
            peer.host = host = Host(peer)
            peer.spawn(host.listen())
        main = self._mains[peer.id] = self._loop.create_task(self._live(peer, rule))
        main.add_done_callback(self._ended)

    def _ended(self, main: asyncio.Task[None]) -> None:
        """A life has ended: the run is over with the last one, or when one of them has failed."""
        if self._over.done():
            return
        error = None if main.cancelled() else main.exception()
        if error is not None:
            self._over.set_exception(error)
        elif not self._peers:
            self._over.set_result(None)

    def _follow(self) -> None:
        """Wait for the next of what comes after the listed events, such as churn, which need not end."""
        event = next(self._later, None)
        self._next_s = math.inf if event is None else event.at_s
        if event is not None:
            self._loop.call_at(event.at_s, self._befall_and_follow, event)

    def _befall_and_follow(self, event: Event) -> None:
        self._befall(event)
        self._follow()

    def _befall(self, event: Event) -> None:
        """Play an event of one worker, or the coordinator's; "slow" ones are in the worker's durations."""
        if event.worker is None:
            self._away_until_s = max(self._away_until_s, event.until_s or 0.0)
        elif event.kind == "crash":
            self._crash(event.worker)
        elif event.kind == "preempt":
            peer = self._peers.get(event.worker)
            self._loop.call_at(event.gone_at_s, self._take_away, event.worker, peer)
            if event.notice_s and peer is not None:
                self._restless.add(peer)
                peer.leave(event.notice_s)
        elif event.kind == "join":
            self._join(event.worker)
        elif event.kind == "link" and event.factor is not None:
            self._line_shares[event.worker].append(event.factor)
            self._set_line(event.worker)
            if event.until_s is not None:
                self._loop.call_at(event.until_s, self._mend_line, event.worker, event.factor)

    def _set_line(self, worker: int) -> None:
        share, links = math.prod(self._line_shares[worker]), self._links
        self._network.set_capacity(worker, up_bps=links.up_bps[worker] * share, down_bps=links.down_bps[worker] * share)

    def _mend_line(self, worker: int, factor: float) -> None:
        self._line_shares[worker].remove(factor)
        self._set_line(worker)

    def _take_away(self, worker: int, peer: Peer | None) -> None:
        """The machine that had been given a notice goes, unless it had gone before."""
        if peer is not None and self._peers.get(worker) is peer:
            self._crash(worker)

    def _join(self, worker: int) -> None:
        """The worker comes, or comes back, and asks somebody who takes part for the state."""
        if worker in self._peers:
            return
        self._roster.remove(worker)  # it is here again: nobody need wait until its death is found out
        column = self._grid.column(worker, self._fleet.size)
        host = host_for(worker, self._roster.members, self._hosts, group=column)
        if host is not None:
            self._hosts[worker] = host
        elif not self._grid.mates(worker) & self._peers.keys():
            return  # there is nobody who could let it in
        self._roster.join(worker, alone=host is None)
        newcomer = self._make(worker)
        self._restless.add(newcomer)
        self._begin(newcomer, entering(self._rule, host))

    async def _live(self, peer: Peer, rule: Callable[[Peer], Coroutine[Any, Any, None]]) -> None:
        try:
            await peer.run(rule)
            if self._unsent[peer.id]:
                self._drained[peer.id] = self._loop.create_future()
                await self._drained[peer.id]
        except asyncio.CancelledError:
            if peer.id in self._peers:
                raise
            return  # crashed, and `_crash` has said so
        except PeerGone as error:
            if self._peers.get(peer.id) is not peer:
                return  # it crashed as it was leaving
            self._leave(peer, str(error))
            if peer.guide is not None and str(error) != PREEMPTED:  # its host went: somebody else may let it in
                self._loop.call_soon(self._join, peer.id)
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
        peer.stop()  # before its flows fail, for who waits for them would have a last word
        for flow in self._network.cancel_node(worker):
            self._lose(flow, worker)
        self.record(peer.left("crashed"))
        self._loop.call_later(self._fleet.detection_s, self._detect, worker)

    def _detect(self, worker: int) -> None:
        """It is found out that this life of the worker is over, unless it is back already."""
        if worker not in self._peers:
            self._roster.remove(worker)

    def _changed(self, members: Members) -> None:
        """Tell everybody once an instant, for a thousand workers may finish together; not before somebody can tell."""
        if self._book is not None:
            self._book.changed(members)
        if not self._untold:
            self._untold = True
            if self._loop.time() < self._away_until_s:
                self._loop.call_at(self._away_until_s, self._tell)
            else:
                self._loop.at_instant_end(self._tell)

    def _tell(self) -> None:
        self._untold = False
        self.crowd.changed(self._roster.members)

    # -- the World port --------------------------------------------------------------------------------------------

    async def compute(self, peer: Peer, steps: float, work: Callable[[], T]) -> T:
        """Let `steps` local steps' worth of virtual time pass, then really do the work, in no virtual time."""
        if steps:
            await self._loop.sleep(self._duration(peer.id, steps))
        return work()

    async def train(self, peer: Peer, step: int, steps: int) -> tuple[int, float | None]:
        """Let the steps' virtual time pass, then really do as many as were not interrupted, in no virtual time."""
        seconds = self._duration(peer.id, steps)
        if self._is_calm(self._loop.time() + seconds):
            peer.replica.expect_train(step, steps)
            await self._loop.sleep(seconds)
            return peer.replica.train(step, steps)
        phase = self._phases[peer] = _Phase(self._loop, steps)
        phase.last(seconds)
        try:
            await phase.ended
        finally:
            phase.cancel()
            del self._phases[peer]
        return peer.replica.train(step, phase.steps)

    def interrupt(self, peer: Peer) -> None:
        """End the steps under way with the one at hand, unless it was foreseen that nobody would ask for it."""
        phase = self._phases.get(peer)
        if phase is not None:
            phase.steps, seconds = self._duration.cut(peer.id, phase.steps, phase.began_s)
            phase.last(seconds)

    def _is_calm(self, until_s: float) -> bool:
        """Whether nobody comes or must go until then, as far as can be foreseen: so nothing will be interrupted."""
        place = bisect_left(self._unrest_s, self._loop.time())
        if min([self._next_s, *self._unrest_s[place : place + 1]]) <= until_s:
            return False
        self._restless = {peer for peer in self._restless if self._is_restless(peer)}
        return not self._restless

    def _is_restless(self, peer: Peer) -> bool:
        there = self._peers.get(peer.id) is peer
        return there and (peer.leaves or self._roster.members.guests.get(peer.id) == frozenset())

    async def aside(self, peer: Peer, numel: int, work: Callable[[], T]) -> T:
        """Do the work when the worker's thread for it has done what came before, and had time for this."""
        coding_s = numel * self._coding_s[peer.id]
        if coding_s:
            now = self._loop.time()
            self._coding_until_s[peer.id] = max(now, self._coding_until_s[peer.id]) + coding_s
            await self._loop.sleep(self._coding_until_s[peer.id] - now)
        return work()

    async def backward(self, peer: Peer, fragments: Sequence[Spans], batch: BatchId) -> AsyncIterator[int]:
        """Forward first; then fragments become final one after the other, each after its share of the elements."""
        duration = self._duration(peer.id, 1)
        peer.replica.expect_backward(batch.step, fragments, batch.worker)
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
        if self._sites.several:
            self._sites.sent(peer.id, to, nbytes)
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

        await self._reach_coordinator()
        self._roster.vote(ballot, decided)
        return await answer

    def _hand_over(self, answer: asyncio.Future[Decision], decision: Decision) -> None:
        if not answer.done():
            answer.set_result(decision)

    async def _reach_coordinator(self) -> None:
        """Return when a message from a worker has come to the coordinator and it is there."""
        await self._loop.sleep(self._fleet.latency_s)
        if self._loop.time() < self._away_until_s:
            await self._loop.sleep(self._away_until_s - self._loop.time())

    # -- sample leases ---------------------------------------------------------------------------------------------

    async def lease(self, request: Request) -> Grant:
        """Ask the book, one latency away; the answer takes another one."""
        assert self._book is not None
        await self._reach_coordinator()
        grant = self._book.lease(request)
        await self._loop.sleep(self._fleet.latency_s)
        return grant

    def _record_and_book(self, record: Record) -> None:
        assert self._book is not None
        self._book.saw(record)
        self._write(record)
