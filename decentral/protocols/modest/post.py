"""What the workers of MoDeST send each other: questions, answers, and models with the sender's view."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from torch import Tensor

from decentral.errors import PeerGone
from decentral.peer import Peer
from decentral.protocols.codecs import Codec, Float32
from decentral.protocols.modest.view import View
from decentral.replica import seed_of
from decentral.wire import FrameError, Packet, Tag, signal, signal_text

YES, NO, SPENT, ENOUGH = "yes", "no", "spent", "enough"
"""Answers. Who has no steps left is spent; an aggregator that needs no more models has enough."""


class Post:
    """One worker's messages, and its view of the others, which travels with every model."""

    def __init__(self, peer: Peer, codec: Codec, ping_s: float, inactivity: int) -> None:
        self.peer, self.codec = peer, codec
        self.view = View(peer.cohort.ids)
        self._ping_s, self._inactivity = ping_s, inactivity
        self._salt = seed_of(peer.seed, "committees")

    def order(self, round_: int) -> list[int]:
        """Return who may be asked in a round, in its order."""
        return self.view.order(round_, self._salt, self._inactivity)

    async def ask(self, worker: int, role: str, round_: int, committee: Sequence[int] = ()) -> str | None:
        """Ask another worker and return its answer, None if it says nothing in time."""
        self.peer.send(worker, Tag("ask", 0, role), signal(written(round_, committee)))
        return await self.answered(worker, role, round_, self._ping_s)

    async def answered(self, worker: int, part: str, round_: int, timeout_s: float) -> str | None:
        """Return the worker's answer, None if there is none in time; who is gone has left the view."""
        try:
            _, packet = await self.peer.recv(worker, Tag("answer", round_, part), timeout_s)
            return signal_text(packet)
        except PeerGone:
            self.view.left(worker)
        except (TimeoutError, FrameError):
            pass
        return None

    def answer(self, worker: int, part: str, round_: int, answer: str) -> None:
        """Answer what another worker has asked or sent."""
        self.peer.send(worker, Tag("answer", round_, part), signal(answer))

    def send_model(self, worker: int, channel: str, round_: int, model: Tensor) -> list[asyncio.Future[None]]:
        """Start sending the model `[P]` and our view."""
        view = Float32().encode(self.view.table)
        return [
            self.peer.send(worker, Tag(channel, round_), self.codec.encode(model)),
            self.peer.send(worker, Tag(channel, round_, "view"), view),
        ]

    async def opened(self, source: int, channel: str, round_: int, packet: Packet) -> Tensor:
        """Return the model of a packet, and learn the view that comes with it."""
        _, view = await self.peer.recv(source, Tag(channel, round_, "view"))
        self.view.merge(Float32().decode(view, self.view.table.flatten()))
        return self.codec.decode(packet, self.peer.params)


def written(round_: int, committee: Sequence[int]) -> str:
    """Return the text of a round and its committee."""
    return " ".join(map(str, (round_, *committee)))


def read(text: str) -> tuple[int, tuple[int, ...]]:
    """Return what `written` was given; raises `FrameError` for any other text."""
    numbers = text.split()
    if not numbers or not all(number.isdecimal() for number in numbers):
        raise FrameError("header", f"'{text}' names no round and no committee")
    return int(numbers[0]), tuple(map(int, numbers[1:]))
