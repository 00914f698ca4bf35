"""How a worker comes into a run that has begun: it takes over a member's state, and follows it until it takes part.

A newcomer is a guest (see `members.Members`). It asks a member for its state, which that gives at rest: between rounds,
before its next local step. From then on the member, its *host*, sends it the means that rounds come to, so that it may
run the rule as everybody does, only that its local steps pass without work and its rounds are heard instead of made.
It votes as a guest; the first round that is decided after its vote is the last one without it. Nobody waits for it but
its host, and that only when it has fallen `AHEAD` rounds behind.

A rule without votes follows nobody: the newcomer begins where its host is when the state has come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, NonNegativeInt, ValidationError
from torch import Tensor

from decentral.errors import PeerGone
from decentral.members import Ballot, Decision
from decentral.peer import Peer
from decentral.protocols.codecs import Float32
from decentral.protocols.rule import SyncRule
from decentral.replica import digest
from decentral.snapshot import Snapshot
from decentral.wire import FrameError, Packet, Tag, signal, signal_text

AHEAD = 4
"""Means that may be on their way to a newcomer, or wait there for it."""
PATIENCES = 20
"""A state may take so many times a worker's patience: it may be asked for in the midst of a long phase."""

ASK = Tag("join", 0, "ask")
HEAD = Tag("join", 0, "head")
TAIL = Tag("join", 0, "tail")
PLAIN = Float32()
GIVEN_UP = "given up"


class _Place(BaseModel):
    """Where a host stands: local steps done, and rounds begun by channel."""

    step: NonNegativeInt
    rounds: dict[str, NonNegativeInt]


class _Head(_Place):
    """What a state is, before its tensors come: their names and lengths, and a digest of them all."""

    tensors: list[tuple[str, NonNegativeInt]]
    digest: str


M = TypeVar("M", bound=BaseModel)


async def enter(peer: Peer, host: int, follow: bool) -> None:
    """Bring a newcomer to where it may run the rule, with the state of the member `host`.

    `follow`: its rounds are voted on, so it hears them until it takes part; otherwise it takes part from now on. Raises
    `PeerGone` if the host goes, or does not give a state.
    """
    guide = Guide(peer, host)
    await guide.take_state()
    if follow:
        peer.guide = guide
    else:
        await guide.catch_up()
        await peer.vote(Ballot(peer.id, "", 0, 0, None))


def entering(rule: SyncRule, host: int) -> Callable[[Peer], Coroutine[Any, Any, None]]:
    """Return what a newcomer runs whom the member `host` lets in: the rule, once it has its state, and its own back."""

    async def enter_and_run(peer: Peer) -> None:
        await enter(peer, host, follow=rule.newcomers == "follow")
        if peer.guard is not None:
            await peer.guard.entered()
        await rule.run(peer)

    return enter_and_run


class Host:
    """Lets newcomers in: gives them `peer`'s state at rest, and the means of the rounds in which they take no part."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._asking: list[int] = []
        self._guests: dict[int, _Guest] = {}

    async def listen(self) -> None:
        """Hear who asks, for ever."""
        while True:
            guest, _ = await self._peer.recv(None, ASK, math.inf)
            self._asking.append(guest)

    def rest(self) -> None:
        """The worker is at rest: whoever has asked gets its state as it is now."""
        asking, self._asking = self._asking, []
        for guest in asking:
            state = self._peer.snapshot()
            self._guests[guest] = _Guest(len(self._peer.everybody.departed), state.rounds)
            self._peer.spawn(self._give(guest, state))

    async def settled(self, channel: str, number: int, decision: Decision, means: Sequence[Tensor]) -> None:
        """A round has come to `decision`, and to these means if it was not skipped: tell the guests it went without."""
        for worker, guest in list(self._guests.items()):
            if worker in self._peer.everybody.departed[guest.since :]:
                self._guests.pop(worker, None)
            elif worker not in decision.members:
                self._peer.send(worker, _told(channel, number, "outcome"), signal(decision.outcome))
                for index, mean in enumerate(means):
                    self._peer.send(worker, _told(channel, number, f"mean {index}"), PLAIN.encode(mean))
                guest.told[channel] = number
                if number - AHEAD > guest.rounds.get(channel, 0):
                    await self._wait_for(worker, guest, _heard(channel, number - AHEAD))

    async def _give(self, guest: int, state: Snapshot) -> None:
        tensors = state.tensors
        head = _Head(
            step=state.step,
            rounds=dict(state.rounds),
            tensors=[(name, values.numel()) for name, values in tensors.items()],
            digest=f"{digest(list(tensors.values())):08x}",
        )
        try:
            await self._peer.send(guest, HEAD, signal(head.model_dump_json()))
            for name, values in tensors.items():
                await self._peer.send(guest, _part(name), PLAIN.encode(values))
            tail = _Place(step=self._peer.step, rounds=dict(self._peer.rounds))
            await self._peer.send(guest, TAIL, signal(tail.model_dump_json()))
        except PeerGone:
            self._guests.pop(guest, None)

    async def _wait_for(self, worker: int, guest: _Guest, tag: Tag) -> None:
        """Wait for a guest that is behind; if it does not come, give it up, and let it know wherever it waits."""
        try:
            await self._peer.recv(worker, tag)
        except PeerGone:
            self._guests.pop(worker, None)
        except TimeoutError:
            self._guests.pop(worker, None)
            for channel, number in {**guest.rounds, **guest.told}.items():
                self._peer.send(worker, _told(channel, number + 1, "outcome"), signal(GIVEN_UP))


class _Guest:
    """Who is told what rounds come to. When it took the state, `since` had departed, and `rounds` had been settled."""

    def __init__(self, since: int, rounds: Mapping[str, int]) -> None:
        self.since, self.rounds = since, rounds
        self.told: dict[str, int] = {}


class Guide:
    """A newcomer's line to its host. Everything raises `PeerGone` if the host does not answer, or answers nonsense."""

    def __init__(self, peer: Peer, host: int) -> None:
        self._peer, self._host = peer, host

    async def take_state(self) -> None:
        """Have `peer` be what the host was at rest."""
        self._peer.send(self._host, ASK, signal(""))
        head = await self._told(HEAD, _Head)
        tensors = {name: await self._vector(_part(name), count) for name, count in head.tensors}
        if f"{digest(list(tensors.values())):08x}" != head.digest:
            raise PeerGone(f"its host, worker {self._host}, gave another state than it says")
        self._peer.restore(Snapshot(head.step, head.rounds, tensors))

    async def catch_up(self) -> None:
        """Have `peer` stand where the host stood when the last of its state had come."""
        tail = await self._told(TAIL, _Place)
        self._peer.stand_at(tail.step, tail.rounds)

    async def outcome(self, channel: str, number: int, like: Sequence[Tensor]) -> list[Tensor] | None:
        """Return what a round has come to, in pieces as long as `like`; None if it was skipped."""
        outcome = await self._text(_told(channel, number, "outcome"))
        if outcome == GIVEN_UP:
            raise PeerGone(f"its host, worker {self._host}, has gone on without it: it heard too slowly")
        means = None
        if outcome != "skipped":
            sizes = [piece.numel() for piece in like]
            means = [await self._vector(_told(channel, number, f"mean {i}"), size) for i, size in enumerate(sizes)]
        self._peer.send(self._host, _heard(channel, number), signal(""))
        return means

    async def _vector(self, tag: Tag, count: int) -> Tensor:
        packet = await self._packet(tag)
        try:
            if packet.numel != count:
                raise FrameError("length", f"{tag}: {packet.numel} elements where there are {count}")
            return PLAIN.decode(packet, self._peer.replica.vector(count))
        except FrameError as error:
            raise self._refused(error) from None

    async def _told(self, tag: Tag, cls: type[M]) -> M:
        text = await self._text(tag)
        try:
            return cls.model_validate_json(text)
        except ValidationError:
            raise self._refused(FrameError("codec", f"{tag} is not what it should be")) from None

    async def _text(self, tag: Tag) -> str:
        packet = await self._packet(tag)
        try:
            return signal_text(packet)
        except FrameError as error:
            raise self._refused(error) from None

    async def _packet(self, tag: Tag) -> Packet:
        try:
            return (await self._peer.recv(self._host, tag, PATIENCES * self._peer.patience_s))[1]
        except PeerGone:
            raise PeerGone(f"its host, worker {self._host}, has left") from None
        except TimeoutError:
            raise PeerGone(f"its host, worker {self._host}, does not answer") from None

    def _refused(self, error: FrameError) -> PeerGone:
        self._peer.refuse(self._host, error)
        return PeerGone(f"its host, worker {self._host}, gave a state that cannot be read: {error}")


def _part(name: str) -> Tag:
    return Tag("join", 0, name)


def _told(channel: str, number: int, what: str) -> Tag:
    return Tag(f"told {channel}", number, what)


def _heard(channel: str, number: int) -> Tag:
    return Tag(f"heard {channel}", number)
