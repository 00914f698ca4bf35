"""The real world: what a `Peer` meets when time, threads and sockets are real."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from decentral.errors import PeerGone, RunError
from decentral.journal import Record
from decentral.members import Ballot, Decision
from decentral.peer import Peer
from decentral.protocols import SyncRule
from decentral.replica import BatchId, Spans
from decentral.wire import FrameError, Header, Packet, Tag, pack_header
from decentral.workers.coordinator import CoordinatorClient
from decentral.workers.transport import Contact, Transport

T = TypeVar("T")

REPORT_S = 0.5
"""Seconds between two reports to the coordinator."""
SIGN_OF_LIFE_S = 2.0
"""A worker without news reports that often."""
RETRY_S = 1.0
"""Seconds until the coordinator is asked again after it did not answer."""
VOTE_PATIENCES = 20
"""A decision may take so many times a worker's patience: the others may have to wait for packets first."""


class RealWorld:
    """One worker's world: a thread that computes, a transport that talks, a coordinator that decides."""

    def __init__(self, transport: Transport, coordinator: CoordinatorClient, *, incarnation: int, speed: float) -> None:
        self._transport = transport
        self._coordinator = coordinator
        self._incarnation = incarnation
        self._speed = speed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="train")
        self._coding = ThreadPoolExecutor(1, thread_name_prefix="code")
        self._loop = asyncio.get_running_loop()
        self._unreported: list[Record] = []
        self._reported = 0
        self.layerwise = None  # an inner optimiser may clip by the norm of the whole gradient

    # -- the life of a worker ----------------------------------------------------------------------------------------

    async def live(self, peer: Peer, rule: SyncRule, contacts: Mapping[int, Contact]) -> str:
        """Run the rule to its end and leave the run; return the reason that the journal gives.

        Raises what the task or the rule raised, and `RunError` when the coordinator is lost.
        """
        self._transport.admit(contacts)
        beside = [self._loop.create_task(self._watch(peer, contacts)), self._loop.create_task(self._report())]
        try:
            try:
                await peer.run(rule.run)
                reason = "finished"
            except PeerGone as error:
                reason = str(error)
            await self._transport.drained()
            self.record(peer.left(reason))
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            self._thread.shutdown(wait=False)
            self._coding.shutdown(wait=False)
            with suppress(RunError):  # when the worker fails, its records tell how it came to it
                await self._hand_in()
        await self._coordinator.leave(self._reported, self._unreported)
        return reason

    async def _watch(self, peer: Peer, contacts: Mapping[int, Contact]) -> None:
        """Tell peer and transport who is in the run, whenever that changes."""
        while True:
            try:
                members = await self._coordinator.watch(peer.everybody.epoch)
            except RunError:
                await asyncio.sleep(RETRY_S)
                continue
            if members.epoch > peer.everybody.epoch:
                self._transport.admit({worker: contacts[worker] for worker in members})
                peer.changed(members)

    async def _report(self) -> None:
        """Hand in records as they come. What cannot be handed in now is kept: training does not depend on it."""
        last = self._loop.time()
        while True:
            await asyncio.sleep(REPORT_S)
            if self._unreported or self._loop.time() - last > SIGN_OF_LIFE_S:
                with suppress(RunError):
                    await self._hand_in()
                last = self._loop.time()

    async def _hand_in(self) -> None:
        batch = list(self._unreported)
        await self._coordinator.report(self._reported, batch)
        self._reported += len(batch)
        del self._unreported[: len(batch)]

    # -- the World port ----------------------------------------------------------------------------------------------

    async def compute(self, peer: Peer, steps: float, work: Callable[[], T]) -> T:
        """Do the work in the worker's thread; training takes a slow worker longer, evaluation does not."""
        return await self._loop.run_in_executor(self._thread, self._training(self._slowed(work) if steps else work))

    async def aside(self, work: Callable[[], T]) -> T:
        """Do the work in a thread of its own: the event loop goes on feeding the wire."""
        return await self._loop.run_in_executor(self._coding, work)

    async def backward(self, peer: Peer, fragments: Sequence[Spans], batch: BatchId) -> AsyncIterator[int]:
        """Compute the gradient in the worker's thread; fragments come out of it as they become final."""
        final: asyncio.Queue[int | None] = asyncio.Queue()
        handicap = _Handicap(self._speed)

        def ready(index: int | None) -> None:
            handicap.keep()
            self._loop.call_soon_threadsafe(final.put_nowait, index)

        def work() -> float | None:
            handicap.begin()
            try:
                return peer.replica.backward(batch.step, fragments, ready, batch.worker)
            finally:
                ready(None)

        done = self._loop.run_in_executor(self._thread, self._training(work))
        while (index := await final.get()) is not None:
            yield index
        peer.backward_done(await done)

    def send(self, peer: Peer, to: int, tag: Tag, packet: Packet) -> asyncio.Future[None]:
        """Start streaming the packet to the worker it is for."""
        header = pack_header(
            Header(peer.id, self._incarnation, tag, packet.codec, packet.numel, packet.nbytes, packet.weight)
        )
        arrived = self._transport.send(to, header, packet)
        if to in peer.members:
            peer.meter.sent(len(header) + packet.nbytes)
            peer.meter.begin_transfer()
            arrived.add_done_callback(lambda _future: peer.meter.end_transfer())
        return arrived

    async def vote(self, peer: Peer, ballot: Ballot) -> Decision:
        """Vote at the coordinator. Raises `RunError` when it cannot be reached."""
        return await self._coordinator.vote(ballot, VOTE_PATIENCES * peer.patience_s)

    def record(self, record: Record) -> None:
        """Keep the record for the next report."""
        self._unreported.append(record)

    def _slowed(self, work: Callable[[], T]) -> Callable[[], T]:
        def slowed() -> T:
            handicap = _Handicap(self._speed)
            handicap.begin()
            done = work()
            handicap.keep()
            return done

        return slowed

    def _training(self, work: Callable[[], T]) -> Callable[[], T]:
        """Have the streams make way for this work."""

        def training() -> T:
            self._transport.pace.training = True
            try:
                return work()
            finally:
                self._transport.pace.training = False

        return training


class _Handicap:
    """Makes a thread's work take 1 / speed times as long, by sleeping after it in proportion."""

    def __init__(self, speed: float) -> None:
        self._sleep_share = 1 / speed - 1
        self._since = 0.0

    def begin(self) -> None:
        self._since = time.perf_counter()

    def keep(self) -> None:
        if self._sleep_share:
            time.sleep((time.perf_counter() - self._since) * self._sleep_share)
            self.begin()


class Inbox:
    """Passes what the transport receives to the peer, and keeps its meter."""

    def __init__(self) -> None:
        self.peer: Peer | None = None

    def begin(self) -> None:
        self._known().meter.begin_transfer()

    def deliver(self, header: Header, packet: Packet, nbytes: int) -> None:
        peer = self._known()
        peer.meter.received_bytes += nbytes
        peer.arrived(header.source, header.tag, packet)

    def end(self) -> None:
        self._known().meter.end_transfer()

    def refuse(self, source: int, error: FrameError) -> None:
        self._known().refuse(source, error)

    def _known(self) -> Peer:
        assert self.peer is not None  # the transport takes no packet before it has admitted members
        return self.peer
