"""What an idle worker of MoDeST does: it hears the news, and sees to it that somebody is always at work."""

from __future__ import annotations

import asyncio

from decentral.errors import PeerGone
from decentral.protocols.modest.member import Calls
from decentral.protocols.modest.post import YES, Post, read
from decentral.wire import FrameError, Tag, signal_text


class Watch:
    """One worker's watch over the run. `size` is a committee's; after `quiet_s` without news it asks."""

    def __init__(self, post: Post, calls: Calls, *, size: int, quiet_s: float) -> None:
        self._post, self._calls, self._peer = post, calls, post.peer
        self._size, self._quiet_s = size, quiet_s

    async def keep(self) -> None:
        """Learn of newer rounds; when nobody is at work any more, hand on the model that we have."""
        while True:
            try:
                news = Tag("ask", 0, "news")
                source, packet = await self._peer.recv(None, news, self._quiet_s, among=self._peer.members)
                self._calls.learn(*read(signal_text(packet)))
            except FrameError as error:
                self._peer.refuse(source, error)
            except PeerGone:
                if not any(worker in self._peer.members for worker in self._calls.at_work):
                    self._take_up()
            except TimeoutError:
                newest = self._calls.newest
                if not await self._somebody_works() and self._calls.newest == newest:
                    self._take_up()

    async def _somebody_works(self) -> bool:
        """Return whether one of those who were at work in the newest round says that it still is."""
        calls = self._calls
        others = [worker for worker in calls.at_work if worker != self._peer.id]
        return YES in await asyncio.gather(*(self._post.ask(worker, "work", calls.newest) for worker in others))

    def _take_up(self) -> None:
        """Have our model averaged for the next round, with those of as many others as a committee has."""
        if not self._calls.busy and not self._calls.over:
            stand_ins = self._post.order(self._calls.newest + 1)[: self._size]
            self._calls.take_up(tuple(stand_ins))
