"""The part of an aggregator of MoDeST: to collect a committee's models, and to call the next committee."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection, Sequence
from contextlib import suppress

from torch import Tensor

from decentral.errors import PeerGone
from decentral.protocols.merge import mean
from decentral.protocols.modest.member import Calls, Start
from decentral.protocols.modest.post import Post, written
from decentral.wire import FrameError, Tag, signal

ENOUGH = 3
"""Models with which an aggregator goes on when it has waited too long."""


class Aggregator:
    """The rounds that one worker averages for. `size`, `success` and `timeout_s` are the rule's."""

    def __init__(self, post: Post, calls: Calls, *, size: int, success: float, timeout_s: float) -> None:
        self._post, self._calls, self._peer = post, calls, post.peer
        self._size, self._success, self._timeout_s = size, success, timeout_s
        self._models: dict[int, asyncio.Queue[tuple[int, Tensor] | None]] = {}
        self._done: dict[int, bool] = {}  # rounds that have ended, and whether with a mean

    def begin(self, round_: int, committee: tuple[int, ...]) -> None:
        """Begin to collect the models of a committee for the next round, if that has not begun."""
        if round_ not in self._models:
            self._models[round_] = asyncio.Queue()
            self._peer.spawn(self._collect(round_))
            self._peer.spawn(self._average(round_, committee))

    def add_own(self, start: Start) -> None:
        """Take our own parameters, trained in a round, for the next one."""
        self.begin(start.round + 1, start.committee)
        self._models[start.round + 1].put_nowait((self._peer.id, self._peer.params.clone()))

    async def _average(self, round_: int, committee: tuple[int, ...]) -> None:
        heard = await self._hear(round_, committee)
        enough = len(heard) >= min(ENOUGH, self._needed(committee, heard))
        if enough:
            await self._call(round_, mean([heard[worker] for worker in sorted(heard)]))
        self._done[round_] = enough
        left_over = self._models[round_]
        late = [item[0] for _ in range(left_over.qsize()) if (item := left_over.get_nowait()) is not None]
        for worker in sorted({*heard, *late} - {self._peer.id}):
            self._post.answer(worker, "model", round_, enough)
        outcome = "skipped" if not enough else "committed" if len(heard) == len(committee) else "degraded"
        self._peer.ended_round("committee", round_, outcome, sorted(heard))

    async def _hear(self, round_: int, committee: Sequence[int]) -> dict[int, Tensor]:
        """Return the models by worker, when enough are there or time is up."""
        heard: dict[int, Tensor] = {}
        deadline = self._peer.now() + self._timeout_s
        with suppress(asyncio.TimeoutError, TimeoutError):
            while len(heard) < self._needed(committee, heard):
                item = await asyncio.wait_for(self._models[round_].get(), deadline - self._peer.now())
                if item is not None:
                    heard[item[0]] = item[1]
        return heard

    def _needed(self, committee: Sequence[int], heard: Collection[int]) -> int:
        """Return how many models are enough: none is to be expected of who is gone."""
        there = [worker for worker in committee if worker in heard or worker in self._peer.members]
        return max(1, int(self._success * len(there)))

    async def _collect(self, round_: int) -> None:
        """Pass models on as they come; what comes late is answered and dropped."""
        while True:
            try:
                source, packet = await self._peer.recv(None, Tag("model", round_), among=self._peer.members)
                model = await self._post.opened(source, "model", round_, packet)
            except TimeoutError:
                if round_ in self._done:
                    return
            except PeerGone:
                self._models[round_].put_nowait(None)  # look again how many there can be
            except FrameError as error:
                self._peer.refuse(source, error)
            else:
                if round_ in self._done:
                    self._post.answer(source, "model", round_, self._done[round_])
                else:
                    self._models[round_].put_nowait((source, model))

    async def _call(self, round_: int, model: Tensor) -> None:
        """Send the model to the next committee; to everybody, as the last one, if nobody has steps left."""
        peer = self._peer
        committee = await self._committee(round_)
        others = [worker for worker in peer.members if worker != peer.id]
        if not committee:
            packet = self._post.codec.encode(model)
            for worker in others:
                peer.send(worker, Tag("end", 0), packet)
            self._calls.end(self._post.codec.decode(packet, model))
            return
        text, sent = signal(written(round_, committee)), []
        for worker in others:
            if worker in committee:
                sent += self._post.send_model(worker, "start", round_, model)
                sent.append(peer.send(worker, Tag("start", round_, "who"), text))
            else:
                peer.send(worker, Tag("ask", 0, "news"), text)
        self._calls.learn(Start(round_, committee, model))
        await asyncio.gather(*sent, return_exceptions=True)

    async def _committee(self, round_: int) -> tuple[int, ...]:
        """Return the first of the round's order that answer and have steps left."""
        order, found = iter(self._post.order(round_)), list[int]()
        while batch := list(itertools.islice(order, self._size - len(found))):
            answers = await asyncio.gather(*(self._would_train(worker, round_) for worker in batch))
            found += [worker for worker, yes in zip(batch, answers, strict=True) if yes]
        return tuple(found)

    async def _would_train(self, worker: int, round_: int) -> bool:
        if worker == self._peer.id:
            return self._calls.willing(round_)
        return await self._post.ask(worker, "train", round_)
