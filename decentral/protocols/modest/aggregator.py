"""The part of an aggregator of MoDeST: to collect a committee's models, and to call the next committee."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from torch import Tensor

from decentral.errors import PeerGone
from decentral.protocols.merge import mean
from decentral.protocols.modest.member import Calls, Start
from decentral.protocols.modest.post import NO, SPENT, YES, Post, written
from decentral.wire import FrameError, Packet, Tag, signal


@dataclass(slots=True)
class _Gathering:
    """The models of one round: those that came and are not looked at yet, and whose we have said we would take.

    In `models`, None says that somebody has gone. `open` while we wait for models and average them.
    """

    models: asyncio.Queue[tuple[int, Tensor] | None] = field(default_factory=asyncio.Queue)
    promised: set[int] = field(default_factory=set)
    open: bool = False
    answer: str = ""
    """What those whose models come late are told; nothing as long as the round has not ended."""


class Aggregator:
    """The rounds that one worker averages for. `size`, `success` and `timeout_s` are the rule's."""

    def __init__(self, post: Post, calls: Calls, *, size: int, success: float, timeout_s: float) -> None:
        self._post, self._calls, self._peer = post, calls, post.peer
        self._size, self._success, self._timeout_s = size, success, timeout_s
        self._rounds: dict[int, _Gathering] = {}

    def begin(self, round_: int, committee: tuple[int, ...], source: int) -> bool:
        """Begin to collect the models of a committee for the next round, if that has not begun.

        Return whether we take one of `source`: no more than a committee's worth, for all may offer theirs at once.
        """
        if round_ not in self._rounds:
            self._rounds[round_] = _Gathering()
            self._peer.spawn(self._collect(round_))
        gathering = self._rounds[round_]
        if gathering.answer:
            return False
        if not gathering.open:
            gathering.open = True
            gathering.promised.clear()
            self._peer.spawn(self._average(round_, committee))
        if source not in gathering.promised and len(gathering.promised) >= self._size:
            return False
        gathering.promised.add(source)
        return True

    def add_own(self, start: Start) -> None:
        """Take our own parameters, trained in a round, for the next one."""
        if self.begin(start.round + 1, start.committee, self._peer.id):
            self._rounds[start.round + 1].models.put_nowait((self._peer.id, self._peer.params.clone()))

    async def _average(self, round_: int, committee: tuple[int, ...]) -> None:
        gathering = self._rounds[round_]
        heard = await self._hear(gathering, committee)
        if not heard:
            gathering.open = False  # those who have asked us are gone; somebody else may ask again
            return
        called = await self._call(round_, mean([heard[worker] for worker in sorted(heard)]))
        gathering.open, gathering.answer = False, YES if called else NO
        late = [item[0] for _ in range(gathering.models.qsize()) if (item := gathering.models.get_nowait()) is not None]
        for worker in sorted({*heard, *late} - {self._peer.id}):
            self._post.answer(worker, "model", round_, gathering.answer)
        if called:
            outcome = "committed" if heard.keys() >= {*committee} else "degraded"
            self._peer.ended_round("committee", round_, outcome, sorted(heard))

    async def _hear(self, gathering: _Gathering, committee: Sequence[int]) -> dict[int, Tensor]:
        """Return the models by worker, when enough are there or time is up."""
        heard: dict[int, Tensor] = {}
        deadline = self._peer.now() + self._timeout_s
        with suppress(asyncio.TimeoutError, TimeoutError):
            while len(heard) < self._needed(committee, heard):
                item = await asyncio.wait_for(gathering.models.get(), deadline - self._peer.now())
                if item is not None:
                    heard[item[0]] = item[1]
        return heard

    def _needed(self, committee: Sequence[int], heard: Collection[int]) -> int:
        """Return how many models are enough: none is to be expected of who is gone."""
        there = [worker for worker in committee if worker in heard or worker in self._peer.members]
        return max(1, int(self._success * len(there)))

    async def _collect(self, round_: int) -> None:
        """Take models as they come, until the round has ended and nobody sends any more."""
        gathering = self._rounds[round_]
        while True:
            try:
                source, packet = await self._peer.recv(None, Tag("model", round_), among=self._peer.members)
            except TimeoutError:
                if gathering.answer:
                    return
            except PeerGone:
                gathering.models.put_nowait(None)  # look again how many there can be
            else:
                self._peer.spawn(self._take(source, round_, packet))

    async def _take(self, source: int, round_: int, packet: Packet) -> None:
        """Pass a model on; if it comes late, answer it and drop it."""
        gathering = self._rounds[round_]
        try:
            model = await self._post.opened(source, "model", round_, packet)
        except (PeerGone, TimeoutError):
            return
        except FrameError as error:
            self._peer.refuse(source, error)
            return
        if gathering.answer:
            self._post.answer(source, "model", round_, gathering.answer)
        else:
            gathering.models.put_nowait((source, model))

    async def _call(self, round_: int, model: Tensor) -> bool:
        """Send the model to the next committee; to everybody, as the last one, if nobody has steps left.

        Return whether that is done: not if the others are in that round or a newer one already.
        """
        peer = self._peer
        committee = await self._committee(round_)
        if committee is None:
            return False
        if not committee:
            await self._calls.end(model)
            return True
        text, sent = signal(written(round_, committee)), []
        for worker in peer.members:
            if worker == peer.id:
                continue
            if worker in committee:
                sent += self._post.send_model(worker, "start", round_, model)
                sent.append(peer.send(worker, Tag("start", round_, "who"), text))
            else:
                peer.send(worker, Tag("ask", 0, "news"), text)
        self._calls.learn(round_, committee)
        if peer.id in committee:
            self._calls.call(Start(round_, committee, model))
        await asyncio.gather(*sent, return_exceptions=True)
        return True

    async def _committee(self, round_: int) -> tuple[int, ...] | None:
        """Return the first of the round's order that answer and have steps left; None if it has begun without us."""
        order, found = iter(self._post.order(round_)), list[int]()
        while batch := list(itertools.islice(order, self._size - len(found))):
            answers = await asyncio.gather(*(self._would_train(worker, round_) for worker in batch))
            if NO in answers or self._calls.newest >= round_:
                return None
            found += [worker for worker, answer in zip(batch, answers, strict=True) if answer == YES]
        return tuple(found)

    async def _would_train(self, worker: int, round_: int) -> str | None:
        if worker == self._peer.id:
            return YES if self._peer.steps_left > 0 else SPENT
        return await self._post.ask(worker, "train", round_)
