"""The real world: what a `Peer` meets when time, threads and sockets are real."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from decentral.errors import PeerGone, RunError
from decentral.journal import Record
from decentral.leases import Grant, Request
from decentral.members import Ballot, Decision, Members
from decentral.peer import PREEMPTED, Peer
from decentral.protocols import SyncRule
from decentral.protocols.joining import Host, entering, is_of_newcomers
from decentral.replica import BatchId, Spans
from decentral.wire import FrameError, Header, Packet, Tag, pack_header
from decentral.workers.coordinator import Welcome
from decentral.workers.coordinator_rpc import CoordinatorClient, Dismissed
from decentral.workers.detector import Detector
from decentral.workers.notices import Notice, NoticeSource, listen
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
GOING_S = 3.0
"""Seconds that a worker takes to say good-bye: what it keeps of the time it is given."""
BEAT_S = 0.5
"""Seconds between two beats to a neighbour."""
NEIGHBOURS = 2
"""Members that a worker watches over: so many after it, in the order of their numbers, the first after the last."""


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
        self._handing_in = asyncio.Lock()
        self._peer: Peer
        self._admitted = -1  # the epoch whose members the transport knows
        self._contacts: dict[int, Contact] = {}
        self._detector = Detector(BEAT_S)
        self._must_go = False
        self._interrupted = False
        self._suspects: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._beating: dict[int, asyncio.Task[None]] = {}
        self.layerwise = None  # an inner optimiser may clip by the norm of the whole gradient

    # -- the life of a worker ----------------------------------------------------------------------------------------

    async def live(
        self,
        peer: Peer,
        rule: SyncRule,
        welcome: Welcome,
        *,
        notices: Sequence[NoticeSource] = (),
        absence_s: float,
        away_s: float,
    ) -> str:
        """Run the rule to its end, or until one of the `notices` says that the machine goes, and leave the run.

        Returns the reason that the journal gives. The coordinator may be away for `absence_s` at the end, and for
        `away_s` before. Raises what the task, the rule or what goes on beside it raised, once the run has been left:
        the others would hear of a silence first, and take the worker for dead. And `RunError` when the coordinator is
        lost.
        """
        failure: Exception | None = None
        self._peer = peer
        self._transport.lookout = self
        self._contacts = welcome.contacts
        self._transport.admit(welcome.contacts)
        main = self._loop.create_task(peer.run(_what_to_run(peer, rule, welcome.host)))
        tasks = [
            self._watch(away_s),
            self._report(),
            self._beat(),
            listen(notices, lambda notice: self._heed(main, notice)),
        ]
        beside = [self._begin(task) for task in tasks]
        if rule.takes_newcomers:
            peer.host = host = Host(peer)
            peer.spawn(host.listen())
        try:
            try:
                await main
                reason = "finished"
            except PeerGone as error:
                reason = str(error)
            except asyncio.CancelledError:
                if not self._must_go:
                    raise
                reason = PREEMPTED
            except RunError:
                raise
            except Exception as error:
                failure, reason = error, f"failed: {type(error.__cause__ or error).__name__}"
            hurries = self._must_go or failure is not None  # and does not wait for slow lines
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._transport.drained(), GOING_S / 2 if hurries else None)
            for task in beside:
                if task.done() and failure is None:
                    task.result()  # it may have failed since the rule ended
            self.record(peer.left(reason))
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            self._thread.shutdown(wait=False)
            self._coding.shutdown(wait=False)
            with suppress(Exception):  # when the worker fails, its records tell how it came to that
                await self.hand_in()
        farewell = self._coordinator.leave(self._reported, self._unreported, reason == "finished", absence_s)
        if failure is None:
            await farewell
            return reason
        with suppress(RunError):  # what the worker has met is worth more than that nobody could be told
            await farewell
        raise failure

    def _heed(self, main: asyncio.Task[None], notice: Notice) -> None:
        """Leave between two rounds, or in the midst of one if there is no time."""
        self._peer.leave(notice.deadline_s - GOING_S)

        def go() -> None:
            self._must_go = True
            main.cancel()

        if notice.deadline_s < math.inf:
            self._loop.call_later(max(0.0, notice.deadline_s - GOING_S), go)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run the work beside the rule; the worker ends with what it raises, for nobody awaits it."""

        def ended(task: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            if error is not None:
                self._peer.fail(error)

        task = self._loop.create_task(work)
        task.add_done_callback(ended)
        return task

    async def _watch(self, away_s: float) -> None:
        """Tell peer and transport who is in the run, whenever that changes.

        The worker ends when nobody has said so for `away_s`: its neighbours may be gone, and it would not know.
        """
        seen_s = self._loop.time()
        while True:
            try:
                await self._look(self._admitted)
                seen_s = self._loop.time()
            except Dismissed:  # a rule without votes would never know, and wait a patience for whoever it is to meet
                self._peer.fail(self._peer.declared_dead())
                return
            except RunError:
                if self._loop.time() - seen_s >= away_s:
                    raise
                await asyncio.sleep(RETRY_S)

    async def _look(self, epoch: int) -> None:
        members, contacts = await self._coordinator.watch(epoch)
        if members.epoch > self._admitted:
            self._admitted, self._contacts = members.epoch, contacts
            self._transport.admit(contacts)
            self._peer.changed(members)

    async def catch_up(self) -> None:
        """Know who is in the run as of now."""
        with suppress(RunError):
            await self._look(self._admitted - 1)

    async def _beat(self) -> None:
        """Watch over our neighbours: who does not answer is named to the coordinator."""
        beaten = 0.0
        while True:
            await asyncio.sleep(BEAT_S / 2)  # as often as the detector has to look
            now, neighbours = self._loop.time(), _neighbours(self._peer.everybody, self._peer.id)
            self._detector.watch(neighbours, now)
            if now - beaten >= BEAT_S:
                beaten = now
                for neighbour in set(neighbours) - self._beating.keys():
                    self._beating[neighbour] = self._begin(self._hear(neighbour))
            for silent in self._detector.suspected(now):
                if silent in self._contacts:
                    self.unreachable(silent, self._contacts[silent].incarnation)

    async def _hear(self, neighbour: int) -> None:
        try:
            with suppress(PeerGone):
                await self._transport.beat(neighbour, self._peer.patience_s)
                self._detector.heard(neighbour, self._loop.time())
        finally:  # gRPC cancels whoever waits on a channel that is closed, as of a neighbour that has been replaced
            del self._beating[neighbour]

    def unreachable(self, worker: int, incarnation: int) -> None:
        """A member cannot be reached: somebody should find out whether it still lives."""
        suspect = (worker, incarnation)
        if suspect not in self._suspects:
            self._suspects[suspect] = self._begin(self._suspect(*suspect))

    async def _suspect(self, worker: int, incarnation: int) -> None:
        try:
            with suppress(RunError):
                await self._coordinator.suspect(worker, incarnation)
                self._detector.heard(worker, self._loop.time())  # who is in the run all the same: another has heard it
        finally:
            del self._suspects[worker, incarnation]

    async def _report(self) -> None:
        """Hand in records as they come. What cannot be handed in now is kept: training does not depend on it."""
        last = self._loop.time()
        while True:
            await asyncio.sleep(REPORT_S)
            if self._unreported or self._loop.time() - last > SIGN_OF_LIFE_S:
                with suppress(RunError):
                    await self.hand_in()
                last = self._loop.time()

    async def hand_in(self) -> None:
        """Report what has been recorded so far. Raises `RunError` when the coordinator does not take it."""
        async with self._handing_in:
            batch = list(self._unreported)
            await self._coordinator.report(self._reported, batch)
            self._reported += len(batch)
            del self._unreported[: len(batch)]

    # -- the World port ----------------------------------------------------------------------------------------------

    async def compute(self, peer: Peer, steps: float, work: Callable[[], T]) -> T:
        """Do the work in the worker's thread; training takes a slow worker longer, evaluation does not."""
        return await self._loop.run_in_executor(self._thread, self._training(self._slowed(work) if steps else work))

    async def train(self, peer: Peer, step: int, steps: int) -> tuple[int, float | None]:
        """Train in the worker's thread; a slow worker sleeps after each step, in proportion."""
        self._interrupted = False
        handicap = _Handicap(self._speed)
        by_step = peer.params.device.type == "cpu"  # elsewhere a step has hardly begun when the next one is asked for

        def goes_on() -> bool:
            if by_step:
                handicap.keep()
            return not self._interrupted

        def work() -> tuple[int, float | None]:
            handicap.begin()
            done = peer.replica.train(step, steps, goes_on)
            handicap.keep()
            return done

        return await self._loop.run_in_executor(self._thread, self._training(work))

    def interrupt(self, peer: Peer) -> None:
        """Have the thread stop after the step at hand."""
        self._interrupted = True

    async def aside(self, peer: Peer, numel: int, work: Callable[[], T]) -> T:
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
        arrived = self._transport.send(to, header, packet, makes_way=not is_of_newcomers(tag))
        if to in peer.everybody:
            peer.meter.sent(len(header) + packet.nbytes)
            peer.meter.begin_transfer()
            arrived.add_done_callback(lambda _future: peer.meter.end_transfer())
        return arrived

    async def vote(self, peer: Peer, ballot: Ballot) -> Decision:
        """Vote at the coordinator. Raises `RunError` when it cannot be reached."""
        decision = await self._coordinator.vote(ballot, VOTE_PATIENCES * peer.patience_s)
        if decision.now.epoch > self._admitted:
            await self.catch_up()  # whoever takes part from now on must be somebody whom we know
        return decision

    async def lease(self, request: Request) -> Grant:
        """Ask for samples at the coordinator. Raises `RunError` when it cannot be reached."""
        return await self._coordinator.lease(request, VOTE_PATIENCES * self._peer.patience_s)

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


def _what_to_run(peer: Peer, rule: SyncRule, host: int | None) -> Callable[[Peer], Coroutine[Any, Any, None]]:
    """Return the rule, or what a newcomer runs, whose `host` is itself if its row lets it in."""
    if host is None:
        return rule.run
    return entering(rule, None if host == peer.id else host)


def _neighbours(members: Members, worker: int) -> list[int]:
    """Return the members that the worker watches over."""
    following = [other for other in members if other > worker] + [other for other in members if other < worker]
    return following[:NEIGHBOURS]


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
