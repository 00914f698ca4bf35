"""How a worker comes into a run that has begun: it takes over a member's state, and follows it until it takes part.

A newcomer is a guest (see `members.Members`). It asks a member for its state, which that gives at rest: between rounds
and between two local steps, be it in the midst of a phase. The state travels in segments, several at a time; both sides
hash each of them beside the wire, and the newcomer has it where it will train. A member that goes meanwhile is replaced
by another one.

From then on the member, its *host*, sends it the means that rounds come to, so that it may run the rule as everybody
does, only that its local steps pass without work and its rounds are heard instead of made. It votes as a guest; the
first round that is decided after its vote is the last one without it. Nobody waits for it but its host, after each
round until it has heard it: every further mean on the line would put off its first step by as much. If its host goes
now, its life ends: its vote may have let it into a round whose predecessor it has not heard, and only who comes anew is
a guest again.

A rule without votes follows nobody: the newcomer begins where its host is when the state has come.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, NonNegativeInt, ValidationError
from torch import Tensor

from decentral.errors import PeerGone
from decentral.members import Ballot, Decision, Members, Outcome
from decentral.peer import PREEMPTED, Peer
from decentral.protocols.codecs import Float32
from decentral.protocols.collectives import SEGMENT
from decentral.protocols.rule import SyncRule
from decentral.replica import digest
from decentral.snapshot import Snapshot
from decentral.wire import FrameError, Packet, Tag, signal, signal_text

IN_FLIGHT = 3
"""Segments of a state that are on their way at once: the line stays full while the first one's receipt comes back."""
PATIENCES = 20
"""A state may take so many times a worker's patience: it may be asked for in the midst of a long phase."""

JOIN, TOLD = "join", "told "
"""Channel on which a state is asked for and given; what those begin with on which guests are told of rounds."""
ASK = Tag(JOIN, 0, "ask")
HEAD, TAIL = "head", "tail"
PLAIN = Float32()
GIVEN_UP = "given up"
LEAVES = "leaves"


class _Ask(BaseModel):
    """A newcomer wants the state. When it asks so many have departed, its earlier lives among them.

    What it is given bears that number, so that no life takes what was for an earlier one.
    """

    departed: NonNegativeInt


class _Place(BaseModel):
    """Where a host stands: local steps done, and rounds begun by channel."""

    step: NonNegativeInt
    rounds: dict[str, NonNegativeInt]


class _Head(_Place):
    """What a state is, before its segments come: its tensors' names and lengths."""

    tensors: list[tuple[str, NonNegativeInt]]


class _Tail(_Place):
    """A digest of the state that has come, and where the host stands now."""

    digest: str


M = TypeVar("M", bound=BaseModel)


class Segment(NamedTuple):
    """The elements [start, stop) of a state's tensor."""

    name: str
    start: int
    stop: int


def segments_of(tensors: Iterable[tuple[str, int]]) -> list[Segment]:
    """Cut tensors of these names and lengths into segments of `SEGMENT` elements; the last of each may be shorter.

    One size, so that the memory which one came in fits the next one.
    """
    return [
        Segment(name, start, min(start + SEGMENT, numel))
        for name, numel in tensors
        for start in range(0, numel, SEGMENT)
    ]


def host_for(
    newcomer: int,
    members: Members,
    hosts: Mapping[int, int],
    asked: Collection[int] = (),
    group: tuple[int, ...] = (),
) -> int | None:
    """Return the member that a newcomer had best ask for its state; None if there is none but those it has `asked`.

    Of `group` alone, if given: those who hold what it holds of the model.
    `hosts` says whom newcomers have asked so far, by newcomer. It is one who takes part and has the fewest guests that
    do not; of these, one that has left the run least often; of these, the next one in number.
    """
    party = members.party("", group)
    busy = Counter(host for guest, host in hosts.items() if guest in members and guest not in party)
    lost = Counter(members.departed)
    able = [worker for worker in party if worker != newcomer and worker not in asked]
    return min(able, key=lambda worker: (busy[worker], lost[worker], worker < newcomer, worker), default=None)


def is_of_newcomers(tag: Tag) -> bool:
    """Return whether a newcomer waits for packets of that tag, and trains on nothing until they have come."""
    return tag.channel == JOIN or tag.channel.startswith(TOLD)


async def enter(peer: Peer, host: int, follow: bool) -> None:
    """Bring a newcomer to where it may run the rule, with the state of the member `host`, or of another if that goes.

    `follow`: its rounds are voted on, so it hears them until it takes part; otherwise it takes part from now on. Raises
    `PeerGone` when nobody is left who gives a state, or the newcomer has been told to leave.
    """
    if peer.leaves:
        raise PeerGone(PREEMPTED)
    guide = peer.guide = Guide(peer, host)
    try:
        now = await guide.take_state()
    except PeerGone:
        peer.guide = None  # nobody else could let it in
        raise
    if not follow:
        if peer.row is None:  # otherwise its row has yet to do what its host is about
            peer.stand_at(now.step, now.rounds)
        await peer.vote(Ballot(peer.id, "", 0, 0, None))
        peer.guide = None


def entering(rule: SyncRule, host: int | None) -> Callable[[Peer], Coroutine[Any, Any, None]]:
    """Return what a newcomer runs whom the member `host` lets in: the rule, once it has its state, and its own back.

    None: nobody else holds its stage, and the others of its row let it in.
    """

    async def enter_and_run(peer: Peer) -> None:
        if host is not None:
            await enter(peer, host, follow=rule.newcomers == "follow")
        if peer.row is not None:
            await peer.row.enter(holds=host is not None)
        if peer.guard is not None:
            await peer.guard.entered()
        await rule.run(peer)

    return enter_and_run


class Host:
    """Lets newcomers in: gives them `peer`'s state at rest, and the means of the rounds in which they take no part."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._asking: dict[int, int] = {}  # how many had departed when they asked
        self._guests: dict[int, _Guest] = {}
        self._of_step: list[_Settled] = []  # rounds on this local step's gradient

    async def listen(self) -> None:
        """Hear who asks, for ever."""
        while True:
            guest, packet = await self._peer.recv(None, ASK, math.inf)
            try:
                self._asking[guest] = _read(signal_text(packet), _Ask).departed
            except FrameError as error:
                self._peer.refuse(guest, error)
            if self._peer.leaves:
                self.decline()
            else:
                self._peer.rest_amid_phase()

    def decline(self) -> None:
        """The worker is about to leave: whoever has asked had better ask somebody else."""
        asking, self._asking = self._asking, {}
        for guest, departed in asking.items():
            self._peer.send(guest, _part(departed, HEAD), signal(LEAVES))

    def rest(self) -> None:
        """The worker is at rest: whoever has asked gets its state as it is now."""
        self._of_step.clear()
        self._let_in()

    def rest_before_update(self) -> None:
        """The worker has a gradient's mean and waits to step by it, for others who may be waiting for a newcomer.

        Whoever has asked gets its state, to which the rounds on that gradient are yet to come, and is told of these.
        """
        if self._of_step:
            self._let_in()

    async def settled(
        self, channel: str, number: int, decision: Decision, means: Sequence[Tensor], *, cumulative: bool
    ) -> None:
        """A round has come to `decision`, and to these means if it was not skipped: tell the guests it went without.

        Of one that is not `cumulative` the rule keeps nothing before the update: until then it can still be told of.
        """
        round_ = _Settled(channel, number, decision.outcome, means)
        if not cumulative:
            self._of_step.append(round_)
        for worker, guest in list(self._guests.items()):
            if not self._is_here(worker, guest):
                self._forget(worker, guest)
            elif worker not in decision.members:
                self._tell(worker, guest, round_)
                await self._wait_for(worker, guest, channel, number)

    def _let_in(self) -> None:
        """Give whoever has asked the state as it is now; it has yet to hear the rounds on this step's gradient."""
        asking, self._asking = self._asking, {}
        if not asking:
            return
        snapshot = self._peer.snapshot()
        begun = {round_.channel: round_.number - 1 for round_ in reversed(self._of_step)}
        state = _State(replace(snapshot, rounds={**snapshot.rounds, **begun}))
        for worker, departed in asking.items():
            guest = self._guests[worker] = _Guest(departed, state.snapshot.rounds)
            for round_ in self._of_step:
                self._tell(worker, guest, round_)
            self._peer.spawn(self._give(worker, guest, state))

    def _tell(self, worker: int, guest: _Guest, round_: _Settled) -> None:
        channel, number, outcome, means = round_
        self._peer.send(worker, _told(channel, number, "outcome"), signal(outcome))
        for index, mean in enumerate(means):
            self._peer.send(worker, _told(channel, number, f"mean {index}"), PLAIN.encode(mean))
        guest.told[channel] = number

    async def _give(self, worker: int, guest: _Guest, state: _State) -> None:
        """Send the state for as long as the guest is here and has not asked anew."""
        peer, flights = self._peer, deque[Awaitable[None]]()
        peer.send(worker, _part(guest.since, HEAD), signal(state.head.model_dump_json()))
        try:
            for index, (_, start, stop) in enumerate(state.segments):
                packet = await peer.aside(stop - start, partial(state.packet, index))
                if len(flights) == IN_FLIGHT:
                    await flights.popleft()
                if not self._is_here(worker, guest):
                    raise PeerGone(f"worker {worker} has left, or has asked again")
                flights.append(peer.send(worker, _part(guest.since, f"{index}"), packet))
            for flight in flights:
                await flight
            tail = _Tail(step=peer.step, rounds=dict(peer.rounds), digest=_joined(state.digests))
            await peer.send(worker, _part(guest.since, TAIL), signal(tail.model_dump_json()))
        except PeerGone:
            self._forget(worker, guest)

    async def _wait_for(self, worker: int, guest: _Guest, channel: str, number: int) -> None:
        """Wait until the guest has heard that; if it does not come, give it up, and let it know wherever it waits.

        Not only what is too much: who is always a round behind would never vote in time on a round that is to come.
        """
        try:
            await self._peer.recv(worker, _heard(channel, number))
        except PeerGone:
            self._forget(worker, guest)
        except TimeoutError:
            if self._forget(worker, guest):
                for each, last in {**guest.rounds, **guest.told}.items():
                    self._peer.send(worker, _told(each, last + 1, "outcome"), signal(GIVEN_UP))

    def _is_here(self, worker: int, guest: _Guest) -> bool:
        """Whether the worker is still who asked then."""
        return self._guests.get(worker) is guest and worker not in self._peer.everybody.departed[guest.since :]

    def _forget(self, worker: int, guest: _Guest) -> bool:
        """Look after this guest no more; return False if it was over, and what the worker asked anew goes on."""
        known = self._guests.get(worker) is guest
        if known:
            del self._guests[worker]
        return known


class _Settled(NamedTuple):
    """A round that has ended, and its pieces' means; none if it was skipped."""

    channel: str
    number: int
    outcome: Outcome
    means: Sequence[Tensor]


class _Guest:
    """Who is told what rounds come to. As it asked, `since` had departed; in what it was given, `rounds` were over."""

    def __init__(self, since: int, rounds: Mapping[str, int]) -> None:
        self.since, self.rounds = since, rounds
        self.told: dict[str, int] = {}


class _State:
    """A state for all who have asked before the same rest: one copy of it, each segment of which is hashed once."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        tensors = [(name, values.numel()) for name, values in snapshot.tensors.items()]
        self.head = _Head(step=snapshot.step, rounds=dict(snapshot.rounds), tensors=tensors)
        self.segments = segments_of(tensors)
        self.digests: dict[int, int] = {}

    def packet(self, index: int) -> Packet:
        """Return a segment's packet, in the copy's own storage where it can be, with its digest made."""
        name, start, stop = self.segments[index]
        values = self.snapshot.tensors[name][start:stop]
        if index not in self.digests:
            self.digests[index] = digest([values])
        return PLAIN.lend(values)


class Guide:
    """A newcomer's line to its host. Everything raises `PeerGone` if the host does not answer, or answers nonsense."""

    def __init__(self, peer: Peer, host: int) -> None:
        self._peer, self._host = peer, host
        self._asked = {host}
        self._departed = 0  # when it asked
        self.lost = False

    async def take_state(self) -> _Place:
        """Have `peer` be what the host was at rest; return where the host stands when the last of it has come.

        If the host goes, or what it gives cannot be used, another member is asked. Raises `PeerGone` if none is left.
        """
        while True:
            try:
                return await self._take_state()
            except PeerGone as error:
                other = self._other()
                if other is None:
                    raise PeerGone(f"nobody is left who could give it a state: {error}") from None
                self._host = other
                self._asked.add(other)

    async def outcome(self, channel: str, number: int, like: Sequence[Tensor]) -> list[Tensor] | None:
        """Return what a round has come to, in pieces as long as `like`; None if it was skipped."""
        try:
            return await self._outcome(channel, number, like)
        except PeerGone:
            self.lost = True
            raise

    async def _outcome(self, channel: str, number: int, like: Sequence[Tensor]) -> list[Tensor] | None:
        outcome = await self._text(_told(channel, number, "outcome"))
        if outcome == GIVEN_UP:
            raise PeerGone(f"its host, worker {self._host}, has gone on without it: it heard too slowly")
        means = None
        if outcome != "skipped":
            means = []
            for index, piece in enumerate(like):
                mean = self._peer.replica.vector(piece.numel())
                await self._read_into(mean, _told(channel, number, f"mean {index}"))
                means.append(mean)
        self._peer.send(self._host, _heard(channel, number), signal(""))
        return means

    async def _take_state(self) -> _Place:
        peer = self._peer
        self._departed = len(peer.everybody.departed)
        peer.send(self._host, ASK, signal(_Ask(departed=self._departed).model_dump_json()))
        head = await self._head()
        tensors = {name: peer.room_for(name, numel) for name, numel in head.tensors}
        digests = {}
        for index, (name, start, stop) in enumerate(segments_of(head.tensors)):
            digests[index] = await self._read_into(tensors[name][start:stop], self._tag(f"{index}"))
        tail = self._said(await self._text(self._tag(TAIL)), _Tail)
        if _joined(digests) != tail.digest:
            raise PeerGone(f"its host, worker {self._host}, gave another state than it says")
        peer.restore(Snapshot(head.step, head.rounds, tensors))
        return tail

    async def _head(self) -> _Head:
        """Return what the host begins with. Who is about to leave gives nothing: it is left for another, if any."""
        text = await self._text(self._tag(HEAD))
        if text == LEAVES:
            if self._other() is not None:
                raise PeerGone(f"its host, worker {self._host}, is about to leave")
            text = await self._text(self._tag(HEAD))  # none will come, but until that has gone somebody else may
        return self._said(text, _Head)

    def _tag(self, name: str) -> Tag:
        return _part(self._departed, name)

    def _other(self) -> int | None:
        """Return whom to ask next, if anybody."""
        peer = self._peer
        return host_for(peer.id, peer.members, {}, self._asked) if peer.id in peer.everybody else None

    async def _read_into(self, place: Tensor, tag: Tag) -> int:
        """Have a vector as long as `place` there, beside the wire; return its digest."""
        packet = await self._packet(tag)

        def read() -> int:
            PLAIN.read(packet, place, into=place)
            return digest([place])

        try:
            return await self._peer.aside(place.numel(), read)
        except FrameError as error:
            raise self._refused(error) from None

    async def _text(self, tag: Tag) -> str:
        packet = await self._packet(tag)
        try:
            return signal_text(packet)
        except FrameError as error:
            raise self._refused(error) from None

    def _said(self, text: str, cls: type[M]) -> M:
        try:
            return _read(text, cls)
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


def _read(text: str, cls: type[M]) -> M:
    """Return what `text` says; raises `FrameError` if it is nothing of the kind."""
    try:
        return cls.model_validate_json(text)
    except ValidationError:
        raise FrameError("codec", f"not what a newcomer and its host tell each other: {text[:40]!r}") from None


def _joined(digests: Mapping[int, int]) -> str:
    """Return one digest of a state's segments, by theirs."""
    return f"{zlib.crc32(b''.join(digests[index].to_bytes(4, 'big') for index in sorted(digests))):08x}"


def _part(departed: int, name: str) -> Tag:
    return Tag(JOIN, 0, f"{departed} {name}")


def _told(channel: str, number: int, what: str) -> Tag:
    return Tag(TOLD + channel, number, what)


def _heard(channel: str, number: int) -> Tag:
    return Tag(f"heard {channel}", number)
