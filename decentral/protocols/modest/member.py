"""The part of a member of a MoDeST committee: to be called, and to hand its model on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from torch import Tensor

from decentral.errors import PeerGone
from decentral.protocols.modest.post import Post, read
from decentral.wire import FrameError, Tag, signal_text


class Start(NamedTuple):
    """A round to train in, from `model` `[P]`; nobody is in the last one's committee."""

    round: int
    committee: tuple[int, ...]
    model: Tensor


class Calls:
    """The rounds that one worker is called to train in; None in `queue` ends its part."""

    def __init__(self, post: Post, committee: tuple[int, ...]) -> None:
        self._post = post
        self.newest = 1
        self._at_work = committee
        self.queue: asyncio.Queue[Start | None] = asyncio.Queue()
        if post.peer.id in committee:
            self.queue.put_nowait(Start(1, committee, post.peer.params.clone()))

    def learn(self, start: Start) -> None:
        """Remember who is at work in the newest round; if we are, it is a call."""
        if start.round > self.newest:
            self.newest, self._at_work = start.round, start.committee
            if self._post.peer.id in start.committee:
                self.queue.put_nowait(start)

    def willing(self, round_: int) -> bool:
        """Return whether we would train in a round."""
        return self._post.peer.steps_left > 0 and round_ > self.newest

    def end(self, model: Tensor) -> None:
        """Take over the last mean and come to an end."""
        self.queue.put_nowait(Start(0, (), model))
        self.queue.put_nowait(None)

    def see_who_is_left(self) -> None:
        """Come to an end if all who were at work are gone: nobody will call us any more."""
        if not any(worker in self._post.peer.members for worker in self._at_work):
            self.queue.put_nowait(None)

    async def await_start(self, source: int, round_: int) -> None:
        """Wait for the model that `source` has announced."""
        peer = self._post.peer
        with suppress(PeerGone, TimeoutError):
            try:
                _, packet = await peer.recv(source, Tag("start", round_))
                model = await self._post.opened(source, "start", round_, packet)
                _, who = await peer.recv(source, Tag("start", round_, "who"))
                self.learn(Start(round_, read(signal_text(who))[1], model))
            except FrameError as error:
                peer.refuse(source, error)

    async def hear_the_end(self) -> None:
        """Wait for the last mean, whoever sends it."""
        peer = self._post.peer
        while True:
            with suppress(TimeoutError):
                source, packet = await peer.recv(None, Tag("end", 0))
                try:
                    self.end(self._post.codec.decode(packet, peer.params))
                except FrameError as error:
                    peer.refuse(source, error)

    async def deliver(self, start: Start, own: Callable[[Start], None], timeout_s: float) -> None:
        """Bring the parameters to who averages them for the next round, ourselves by `own`.

        Drops them if a newer round is known.
        """
        peer, next_ = self._post.peer, start.round + 1
        self._post.view.saw(peer.id, start.round)
        for candidate in self._post.order(next_):
            if self.newest > start.round:
                return
            if candidate == peer.id:
                own(start)
                return
            if await self._post.ask(candidate, "average", next_, start.committee):
                self._post.send_model(candidate, "model", next_, peer.params)
                if await self._post.answered(candidate, "model", next_, timeout_s):
                    return
        peer.ended_round("committee", next_, "skipped", [peer.id])
