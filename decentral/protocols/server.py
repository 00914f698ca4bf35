"""The server of rules that have one: it owns the global model, takes pushes, and sends workers out again."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from decentral.peer import Peer
from decentral.protocols.hosting import (
    GLOBALS,
    Push,
    UsualNorms,
    deliver,
    hear,
    knock,
    pull_channel,
    push_channel,
    stay_of,
)
from decentral.wire import SIGNAL, FrameError, Packet, Tag

if TYPE_CHECKING:
    from decentral.protocols.server_rule import ServerRule

NEWEST_SHARE = 0.9
"""Of the last measurement in the running mean of a worker's seconds a step."""


class _Dispatch(NamedTuple):
    version: int
    at_s: float
    assigned: int


class Server:
    """The server's state: `model` float32, `[P]` or as many as the rule sends, and `version`, the updates so far.

    `first`: all members begin now with this model; otherwise another server has sent them out.
    """

    def __init__(self, rule: ServerRule, peer: Peer, model: Tensor, *, first: bool) -> None:
        self._rule, self._codec = rule, rule.push_codec(peer)
        self._arrived: deque[Push] = deque()
        self._news = asyncio.Event()
        dispatched = _Dispatch(0, peer.now(), rule.first_assignment()) if first else _Dispatch(-1, peer.now(), 0)
        self._out = dict.fromkeys(peer.members, dispatched)
        self._stay = stay_of(peer, peer.id)
        self._stays = {worker: stay_of(peer, worker) for worker in peer.members}
        self._listening: list[asyncio.Task[None]] = []
        self._number: dict[int, int] = {}  # of each worker's last push
        self._steps: dict[int, int] = {}  # that each worker has done
        self._norms = UsualNorms(peer.norm_limit)
        self._packet: Packet | None = None
        self.peer = peer
        self.total = peer.step + peer.steps_left
        """Local steps of each worker in the run."""
        self.began = peer.step
        """Local steps that our own worker had done when we began."""
        self.done = peer.step
        """Local steps that most of those had done whose pushes the updates are made of."""
        self.model = self.slot("global", model)
        self.version = 0
        self.step_s: dict[int, float] = {}
        """Running mean of each worker's seconds a local step, transfers included, once it is known."""

    async def serve(self) -> None:
        """Serve until nobody is out; then send everybody the model."""
        self._listening = [self.peer.spawn(self._listen(worker)) for worker in self._stays]
        self._listening.append(self.peer.spawn(self._welcome()))
        await self._rule.serve(self)
        for worker in sorted(set(self._steps) - set(self._out)):
            if self._is_there(worker):
                self._send(worker, self.total + 1)  # a step that nobody has left
        for listener in self._listening:
            listener.cancel()

    def slot(self, name: str, like: Tensor | None = None) -> Tensor:
        """Return a buffer of the server's, as `Peer.slot` does; a newcomer that our worker lets in has no copy."""
        return self.peer.slot(name, like, own=True)

    @property
    def assigned(self) -> dict[int, int]:
        """What each worker is working on that has been sent out."""
        return {worker: out.assigned for worker, out in self._out.items()}

    @property
    def expected(self) -> set[int]:
        """Workers of whom a push is here and not taken, or may still come."""
        return {*self._out, *(push.worker for push in self._arrived)}

    def left(self, worker: int) -> int:
        """Return how many local steps a worker still has to do; 0 if it has gone."""
        return max(0, self.total - self._steps.get(worker, 0)) if self._is_there(worker) else 0

    async def push(self, until_s: float = math.inf) -> Push | None:
        """Return the next push; None at time `until_s`, and when none can come because all wait or have finished."""
        while not self._arrived:
            left_s = until_s - self.peer.now()
            if not self._out or left_s <= 0:
                return None
            self._news.clear()
            news = asyncio.ensure_future(self._news.wait())
            try:
                await asyncio.wait([news], timeout=None if left_s == math.inf else left_s)
            finally:
                news.cancel()
        push = self._arrived.popleft()
        return push._replace(staleness=self.version - push.version)

    def dispatch(self, worker: int, assigned: int, model: Tensor | None = None) -> None:
        """Send a worker the model, or another one, and what it is to do; not if that is 0 or it has no steps left."""
        if assigned and self.left(worker):
            self._out[worker] = _Dispatch(self.version, self.peer.now(), assigned)
            self._send(worker, assigned, model)

    def updated(self, workers: Sequence[int], outcome: str = "committed") -> None:
        """The model has changed (or, `outcome` "skipped", has not) by what these workers pushed: journal it."""
        self.version += 1
        if workers:
            self.done = max(self.done, statistics.median_high(self._steps[worker] for worker in workers))
        self._packet = None
        self.peer.ended_round(f"server {self._stay}", self.version, outcome, sorted(workers))

    def _send(self, worker: int, assigned: int, model: Tensor | None = None) -> None:
        if self._packet is None:
            self._packet = GLOBALS.encode(self.model)
        packet = self._packet if model is None else GLOBALS.encode(model)
        tag = Tag(pull_channel(self._stay, self._stays[worker]), self._number[worker])
        deliver(self.peer, worker, tag, dataclasses.replace(packet, weight=assigned))

    def _is_there(self, worker: int) -> bool:
        """Say whether a worker is still there in the stay in which we listen to it."""
        return self._stays.get(worker) == stay_of(self.peer, worker)

    async def _welcome(self) -> None:
        """Listen to newcomers too, as they knock."""
        while True:
            worker, _ = await self.peer.recv(None, knock(self._stay), math.inf)
            if not self._is_there(worker):
                self._stays[worker] = stay_of(self.peer, worker)
                self._out[worker] = _Dispatch(-1, self.peer.now(), 0)
                self._listening.append(self.peer.spawn(self._listen(worker)))

    async def _listen(self, worker: int) -> None:
        """Take a worker's pushes as they come, each at most once, until it has gone."""
        stay = self._stays[worker]
        channel = push_channel(self._stay, stay)
        for number in itertools.count(1):
            packet = await hear(self.peer, worker, stay, Tag(channel, number))
            if packet is None:
                break
            self.peer.close(channel, number)
            self._number[worker] = number
            self._take(worker, packet)
            self._news.set()
        if self._stays[worker] == stay:  # else it has knocked again, and is out anew
            self._out.pop(worker, None)
            self._news.set()

    def _take(self, worker: int, packet: Packet) -> None:
        out = self._out.pop(worker, _Dispatch(-1, self.peer.now(), 0))
        steps = packet.weight - 1
        elapsed_s = self.peer.now() - out.at_s
        if out.assigned and elapsed_s > 0:  # else nobody here knows when it began with what
            step_s = elapsed_s / max(1, steps - self._steps.get(worker, self.began))
            known_s = self.step_s.get(worker, step_s)
            self.step_s[worker] = known_s + NEWEST_SHARE * (step_s - known_s)
        self._steps[worker] = steps
        try:
            if packet.codec != SIGNAL:
                values = self._codec.decode(packet, self.model)
                self._norms.require(values)
                self._arrived.append(Push(worker, values, out.assigned, out.version, 0, elapsed_s))
                return
        except FrameError as error:
            self.peer.refuse(worker, error)
        self.dispatch(worker, self._rule.next_assignment(self, worker))  # its push was lost here, or with its server
