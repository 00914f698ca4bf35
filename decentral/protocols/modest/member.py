"""The part of a member of a MoDeST committee: to be called, to hand its model on, and to hear of the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from torch import Tensor

from decentral.errors import PeerGone
from decentral.protocols.modest.post import ENOUGH, YES, Post, read, written
from decentral.wire import FrameError, Packet, Tag, signal, signal_text


class Start(NamedTuple):
    """A round to train in, from `model` `[P]`; without one there is only our own model to be handed on."""

    round: int
    committee: tuple[int, ...]
    model: Tensor | None


class Calls:
    """The rounds that one worker is called to train in, and the end of the run.

    `at_work` is the committee of the `newest` round that it knows. It waits `patience_s` for its model to be averaged.
    """

    def __init__(self, post: Post, committee: tuple[int, ...], patience_s: float) -> None:
        self._post, self._patience_s = post, patience_s
        self._queue: asyncio.Queue[Start | None] = asyncio.Queue()
        self._working = False
        self._called = 0
        self._last: Packet | None = None
        self.newest = 0
        self.at_work = committee
        self.learn(1, committee)
        if post.peer.id in committee:
            self.call(Start(1, committee, post.peer.params.clone()))

    # -- rounds ------------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether we train, or wait for our model to be averaged, or are about to."""
        return self._working or not self._queue.empty()

    async def next(self) -> Start | None:
        """Return the next round to work in, when it comes; None at the end of the run."""
        self._working = False
        while (start := await self._queue.get()) is not None and self.over:
            pass  # it is too late for that
        self._working = True
        return start

    def learn(self, round_: int, committee: tuple[int, ...]) -> None:
        """Remember who is at work in the newest round."""
        if round_ > self.newest:
            self.newest, self.at_work = round_, committee

    def call(self, start: Start) -> None:
        """Train in a round, unless we know of a newer one or were called to it before."""
        if start.round >= self.newest and start.round > self._called:
            self._called = start.round
            self.learn(start.round, start.committee)
            self._queue.put_nowait(start)

    def take_up(self, committee: tuple[int, ...]) -> None:
        """Hand our model on as it is, for these to be in the place of the newest round's committee."""
        self._queue.put_nowait(Start(self.newest, committee, None))

    def tell_if_newer(self, worker: int, round_: int) -> bool:
        """Return whether we know of that round or a newer one; if so the worker is told which is the newest."""
        if round_ > self.newest:
            return False
        self._post.peer.send(worker, Tag("ask", 0, "news"), signal(written(self.newest, self.at_work)))
        return True

    async def await_start(self, source: int, round_: int) -> None:
        """Wait for the model that `source` has announced."""
        peer = self._post.peer
        with suppress(PeerGone, TimeoutError):
            try:
                _, packet = await peer.recv(source, Tag("start", round_))
                model = await self._post.opened(source, "start", round_, packet)
                _, who = await peer.recv(source, Tag("start", round_, "who"))
                self.call(Start(round_, read(signal_text(who))[1], model))
            except FrameError as error:
                peer.refuse(source, error)

    async def deliver(self, start: Start, own: Callable[[Start], None]) -> None:
        """Bring the parameters to who averages them for the next round, ourselves by `own`.

        Drops them if a newer round is known, or nobody takes them: `Watch` sees to it that somebody tries again.
        """
        peer, next_ = self._post.peer, start.round + 1
        self._post.view.saw(peer.id, start.round)
        for candidate in self._post.order(next_):
            if self.newest > start.round or self.over:
                return
            if candidate == peer.id:
                own(start)
                return
            answer = await self._post.ask(candidate, "average", next_, start.committee)
            if answer == ENOUGH:
                return
            if answer == YES:
                self._post.send_model(candidate, "model", next_, peer.params)
                if await self._post.answered(candidate, "model", next_, self._patience_s) == YES:
                    return

    # -- the end -----------------------------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether the last mean is here."""
        return self._last is not None

    def last(self) -> Tensor:
        """Return the last mean, `[P]`, which must be here."""
        assert self._last is not None
        return self._post.codec.decode(self._last, self._post.peer.params)

    async def end(self, model: Tensor) -> None:
        """Make this the last mean, unless there is one: send it to everybody, and come to an end when all have it."""
        if not self.over:
            self._last = self._post.codec.encode(model)
            await self._send_the_end()
            self._queue.put_nowait(None)

    async def hear_the_end(self) -> None:
        """Wait for the last mean, whoever sends it, and stay until everybody has it.

        Its sender leaves when all have it. If it dies before, or does not leave, it may have told us alone: then we
        send it to everybody, so that the others do not come to an end of their own.
        """
        peer = self._post.peer
        while not self.over:
            try:
                source, packet = await peer.recv(None, Tag("end", 0))
                self._post.codec.decode(packet, peer.params)
            except TimeoutError:
                continue
            except FrameError as error:
                peer.refuse(source, error)
                continue
            if not self.over:  # else our own aggregator has come to an end at this moment
                self._last = packet
                with suppress(PeerGone, TimeoutError):
                    await peer.recv(source, Tag("end", 0, "left"), self._patience_s)  # which never comes: it leaves
                if source not in peer.members.finished:
                    await self._send_the_end()
                self._queue.put_nowait(None)

    async def _send_the_end(self) -> None:
        """Send everybody the last mean, which is here; return when it has arrived."""
        peer, packet = self._post.peer, self._last
        assert packet is not None
        others = [worker for worker in peer.members if worker != peer.id]
        await asyncio.gather(*(peer.send(worker, Tag("end", 0), packet) for worker in others), return_exceptions=True)
