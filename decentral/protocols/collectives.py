"""Collectives, written once over `Peer.send` and `Peer.recv`. Both worlds send these very messages.

In every all-reduce the owner of a chunk encodes its reduced value once and everybody, the owner included, decodes those
same bytes: the members end with equal bits whatever the codec. With n members and a vector of P elements each member
sends 2 (n - 1) / n of an encoded vector in the butterfly and the ring; in the tree an inner node sends up to three.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from decentral.errors import ConfigError, PeerGone
from decentral.members import Members
from decentral.peer import Peer
from decentral.protocols.codecs import Codec, Wrapper
from decentral.protocols.merge import mean
from decentral.protocols.topology import Links
from decentral.wire import SIGNAL, FrameError, Packet, Tag, signal, signal_text

T = TypeVar("T")

SEGMENT = 1 << 21
"""Elements of a segment, 8 MiB of float32; vectors above `MAX_SEGMENTS` of them have larger ones."""
MAX_SEGMENTS = 64
AHEAD = 4
"""Segments that are sent before the first one's sum is waited for, so that a round trip passes while they travel."""


class Contribution(NamedTuple):
    """What one worker brought to a mean, and how much it says that this counts."""

    worker: int
    values: Tensor
    weight: int


Fold = Callable[[list[Contribution]], Tensor]
"""Makes one vector of the contributions, in ascending order of workers; raises `FrameError` if it cannot."""


def plain_mean(contributions: list[Contribution]) -> Tensor:
    return mean([contribution.values for contribution in contributions])


class Attempt(NamedTuple):
    """One run of a collective: who takes part, what its messages are called, and how contributions are folded.

    `weight` says how much ours counts. Only algorithms in which somebody holds all contributions heed it and `fold`;
    `whole` says that `fold` must see whole contributions, `all_or_none` that it must see everybody's.
    """

    members: Members
    channel: str
    round: int
    piece: str = "0"
    weight: int = 1
    fold: Fold = plain_mean
    whole: bool = False
    all_or_none: bool = False

    def tag(self, part: str) -> Tag:
        return Tag(self.channel, self.round, f"{self.members.epoch}.{self.piece}.{part}")

    async def hear(self, peer: Peer, source: int, tag: Tag) -> Packet:
        """Return the packet from `source`; raises `PeerGone` as soon as any member of the attempt is gone.

        That includes who has ended its rule: a member of an all-reduce stays until the round is decided.
        """
        _, packet = await peer.recv(source, tag, among=self.members)
        return packet

    def packed(self, values: Tensor, codec: Codec) -> Packet:
        """Return the packet of our contribution."""
        packet = codec.lend(values)
        packet.weight = self.weight
        return packet

    async def packets(self, peer: Peer, own: Packet, tag: Tag) -> list[tuple[int, Packet]]:
        """Return what each member sent under the tag, `own` as it travels, in ascending order of workers.

        Raises `PeerGone` and `TimeoutError` when somebody sends nothing.
        """
        heard = []
        for member in self.members:
            packet = own if member == peer.id else await peer.recv_part(member, tag, self.members)
            if packet.codec == SIGNAL:
                raise PeerGone(f"worker {member} has given up {tag}")
            heard.append((member, packet))
        return heard

    def usable(self, peer: Peer, packets: list[tuple[int, Packet]], codec: Codec, like: Tensor) -> list[Contribution]:
        """Return the members' contributions as decoded; who sent what cannot be used is left out.

        Raises `FrameError` when nothing is left, or for the first that cannot be used if it is `all_or_none`.
        """
        usable = []
        for member, packet in packets:
            try:
                usable.append(Contribution(member, codec.read(packet, like), packet.weight))
            except FrameError as error:
                peer.refuse(member, error)
                if self.all_or_none:
                    raise
        if not usable:
            raise FrameError("not_finite", "no member's contribution can be used")
        return usable


def segment_bounds(numel: int, grain: int) -> list[tuple[int, int]]:
    """Cut a vector into the segments (start, stop) that a collective works on one after the other.

    While one is on its way another is encoded and a third is reduced, and only these take memory. Small vectors are one
    segment, and so are those whose codec cannot cut them (`grain` 0).
    """
    if numel <= SEGMENT or not grain:
        return [(0, numel)]
    return chunk_bounds(numel, min(MAX_SEGMENTS, -(-numel // SEGMENT)), grain)


def chunk_bounds(numel: int, chunks: int, grain: int = 1) -> list[tuple[int, int]]:
    """Cut `numel` elements into `chunks` neighbouring parts (start, stop) of about equal size, some maybe empty.

    Cuts are at multiples of `grain`, so that a codec which codes so many elements together gives the same bits.
    """
    grains = -(-numel // grain)
    cuts = [min(numel, grains * index // chunks * grain) for index in range(chunks + 1)]
    return list(itertools.pairwise(cuts))


@contextmanager
def _owing(peer: Peer, owed: Callable[[], list[tuple[int, Tag]]]) -> Iterator[None]:
    """Should the collective fail, tell those to whom we owe packets that none will come: theirs then fails at once.

    `owed` tells what has not been sent yet, in order. Nobody waits for the deadline of somebody else's wait this way,
    and who comes late to a round that the others have given up finds the news in its mail.
    """
    try:
        yield
    except (PeerGone, TimeoutError, FrameError):
        for to, tag in dict(reversed(owed())).items():  # the next one owed to each
            peer.send(to, tag, signal("no"))
        raise


async def aside(peer: Peer, codec: Codec, numel: int, work: Callable[[], T]) -> T:
    """Return what `work` returns, which encodes, decodes or folds `numel` elements: beside the wire if it is much.

    What travels as it is costs little more than the way to another thread and back.
    """
    return work() if codec.loss == "none" else await peer.aside(numel, work)


async def butterfly_mean(peer: Peer, values: Tensor, codec: Codec, attempt: Attempt) -> Tensor:
    """Mean of all members' `values` `[n]` in two hops: each member owns a chunk, hears all, tells all.

    Contributions are encoded once and folded by the owner in ascending order of workers; one that cannot be used is
    refused and left out. Raises `PeerGone`, `TimeoutError` or `FrameError`.
    """
    butterfly = _Butterfly(peer, values, codec, attempt)
    segments = range(len(butterfly.segments))
    with _owing(peer, butterfly.owed):
        for step in range(len(segments) + AHEAD + 1):
            if step in segments:
                await butterfly.scatter(step)
            if step - AHEAD in segments:
                await butterfly.reduce(step - AHEAD)
            if step - AHEAD - 1 in segments:
                await butterfly.collect(step - AHEAD - 1)
    return butterfly.result


class _Butterfly:
    """One member's part in a butterfly: what it does for each segment, and what it has done."""

    def __init__(self, peer: Peer, values: Tensor, codec: Codec, attempt: Attempt) -> None:
        self._peer, self._values, self._codec, self._attempt = peer, values, codec, attempt
        self._members = attempt.members
        self._mine = attempt.members.rank(peer.id)
        self._scattered = self._reduced = 0
        self.segments = [
            [
                (start + first, start + last)
                for first, last in chunk_bounds(stop - start, len(self._members), codec.grain)
            ]
            for start, stop in segment_bounds(values.numel(), codec.grain)
        ]
        self.result = torch.empty_like(values)

    async def scatter(self, segment: int) -> None:
        """Send every owner our part of its chunk."""
        tag = self._attempt.tag(f"s{segment or ''}")
        for owner, (start, stop) in self._others(segment):
            part = self._values[start:stop]
            packet = await self._aside(stop - start, functools.partial(self._attempt.packed, part, self._codec))
            self._peer.send(owner, tag, packet)
        self._scattered += 1

    async def reduce(self, segment: int) -> None:
        """Fold what all have sent of our chunk, and tell them."""
        start, stop = self.segments[segment][self._mine]
        if stop > start:
            part = self._values[start:stop]
            own = await self._aside(stop - start, functools.partial(self._attempt.packed, part, self._codec))
            packets = await self._attempt.packets(self._peer, own, self._attempt.tag(f"s{segment or ''}"))

            def reduced() -> Packet:
                contributions = self._attempt.usable(self._peer, packets, self._codec, part)
                packet = self._codec.lend(self._attempt.fold(contributions))
                self._codec.read(packet, part, into=self.result[start:stop])
                return packet

            coded = len(packets) + 2  # what all have sent is decoded, its mean encoded and decoded
            packet = await self._aside(coded * (stop - start), reduced)
            for member in self._members:
                if member != self._peer.id:
                    self._peer.send(member, self._attempt.tag(f"g{segment or ''}"), packet)
        self._reduced += 1

    async def collect(self, segment: int) -> None:
        """Take the owners' chunks."""
        tag = self._attempt.tag(f"g{segment or ''}")
        for owner, (start, stop) in self._others(segment):
            packet = await self._attempt.hear(self._peer, owner, tag)
            into = self.result[start:stop]
            await self._aside(
                stop - start,
                functools.partial(self._codec.read, packet, self._values[start:stop], into),
            )

    def owed(self) -> list[tuple[int, Tag]]:
        """Return what has not been sent yet, in the order in which the others will ask for it."""
        gathers = range(self._reduced, len(self.segments))
        scatters = range(self._scattered, len(self.segments))
        others = [member for member in self._members if member != self._peer.id]
        return [
            *((member, self._attempt.tag(f"g{segment or ''}")) for segment in gathers for member in others),
            *((member, self._attempt.tag(f"s{segment or ''}")) for segment in scatters for member in others),
        ]

    async def _aside(self, numel: int, work: Callable[[], T]) -> T:
        return await aside(self._peer, self._codec, numel, work)

    def _others(self, segment: int) -> list[tuple[int, tuple[int, int]]]:
        """Return the other owners and their chunks that are not empty."""
        owners = zip(self._members, self.segments[segment], strict=True)
        return [(owner, (start, stop)) for owner, (start, stop) in owners if owner != self._peer.id and stop > start]


async def ring_mean(peer: Peer, values: Tensor, codec: Codec, attempt: Attempt) -> Tensor:
    """Mean of all members' `values` `[n]` around a ring in 2 (n - 1) hops, each to the next member only.

    Partial sums are encoded at every hop, so a lossy codec loses n - 1 times; chunk c is summed from member c on.
    Raises `PeerGone`, `TimeoutError` or `FrameError`.
    """
    ids, count = attempt.members.ids, len(attempt.members)
    place = attempt.members.rank(peer.id)
    following, previous = ids[(place + 1) % count], ids[place - 1]
    owed = [(following, attempt.tag(f"{phase}{hop}")) for phase in "sg" for hop in range(count - 1)]
    bounds = chunk_bounds(values.numel(), count, codec.grain)
    result = torch.empty_like(values)

    def part(index: int) -> tuple[int, int]:
        return bounds[index % count]

    with _owing(peer, lambda: owed):
        start, stop = part(place)
        partial = values[start:stop]
        for hop in range(count - 1):
            peer.send(*owed.pop(0), codec.encode(partial))
            start, stop = part(place - hop - 1)
            packet = await attempt.hear(peer, previous, attempt.tag(f"s{hop}"))
            partial = codec.decode(packet, values[start:stop]) + values[start:stop]
        packet = codec.encode(partial / count)
        result[start:stop] = codec.decode(packet, partial)
        for hop in range(count - 1):
            peer.send(*owed.pop(0), packet)
            start, stop = part(place - hop)
            packet = await attempt.hear(peer, previous, attempt.tag(f"g{hop}"))
            result[start:stop] = codec.decode(packet, values[start:stop])
    return result


async def tree_mean(peer: Peer, values: Tensor, codec: Codec, attempt: Attempt) -> Tensor:
    """Mean of all members' `values` `[n]` up and down a binary tree, about 2 log2(n) hops of the whole vector.

    The root encodes the mean once and the packet is handed down as it is. Partial sums are encoded on the way up.
    Raises `PeerGone`, `TimeoutError` or `FrameError`.
    """
    ids, count = attempt.members.ids, len(attempt.members)
    place = attempt.members.rank(peer.id)
    children = [ids[child] for child in (2 * place + 1, 2 * place + 2) if child < count]
    up, down = attempt.tag("u"), attempt.tag("d")
    parent = [(ids[(place - 1) // 2], up)] if place else []
    owed = [*parent, *((child, down) for child in children)]
    with _owing(peer, lambda: owed):
        total = values.clone()
        for child in children:
            total = total + codec.decode(await attempt.hear(peer, child, up), values)
        if place == 0:
            packet = codec.encode(total / count)
        else:
            to, tag = owed.pop(0)
            peer.send(to, tag, codec.encode(total))
            packet = await attempt.hear(peer, to, down)
        mean_of_all = codec.decode(packet, values)
    for child in children:
        peer.send(child, down, packet)
    return mean_of_all


async def all_gather(peer: Peer, values: Tensor, codec: Codec, attempt: Attempt) -> list[Contribution]:
    """Return every member's `values` `[n]` as decoded, in ascending order of workers: the same bits at every member.

    A member sends n - 1 encoded vectors. What cannot be used is refused by all alike. Raises `PeerGone`,
    `TimeoutError` or `FrameError`.
    """
    own = await aside(peer, codec, values.numel(), lambda: attempt.packed(values, codec))
    tag = attempt.tag("a")
    for member in attempt.members:
        if member != peer.id:
            peer.send(member, tag, own)
    packets = await attempt.packets(peer, own, tag)
    return await aside(peer, codec, len(packets) * values.numel(), lambda: attempt.usable(peer, packets, codec, values))


async def gather_mean(peer: Peer, values: Tensor, codec: Codec, attempt: Attempt) -> Tensor:
    """Mean of all members' `values` `[n]` in one hop: everybody hears everybody and folds by itself.

    Each contribution is encoded once and the mean not at all, so a codec that leaves most of a vector out loses once.
    Raises as `all_gather` does.
    """
    segments = [(0, values.numel())] if attempt.whole else segment_bounds(values.numel(), codec.grain)
    if len(segments) == 1:
        contributions = await all_gather(peer, values, codec, attempt)
        return await aside(peer, codec, values.numel(), lambda: attempt.fold(contributions))
    names = [attempt.tag(f"a{segment or ''}") for segment in range(len(segments))]
    others = [member for member in attempt.members if member != peer.id]
    own: deque[Packet] = deque()  # sent and not yet folded
    sent, result = 0, torch.empty_like(values)
    with _owing(peer, lambda: [(member, name) for name in names[sent:] for member in others]):
        for step in range(len(segments) + AHEAD):
            if step < len(segments):
                start, stop = segments[step]
                pack = functools.partial(attempt.packed, values[start:stop], codec)
                own.append(await aside(peer, codec, stop - start, pack))
                sent += 1
                for member in others:
                    peer.send(member, names[step], own[-1])
            if step >= AHEAD:
                start, stop = segments[step - AHEAD]
                packets = await attempt.packets(peer, own.popleft(), names[step - AHEAD])
                fold = functools.partial(_folded, peer, packets, values[start:stop], codec, attempt)
                result[start:stop] = await aside(peer, codec, len(packets) * (stop - start), fold)
    return result


def _folded(peer: Peer, packets: list[tuple[int, Packet]], like: Tensor, codec: Codec, attempt: Attempt) -> Tensor:
    return attempt.fold(attempt.usable(peer, packets, codec, like))


AllReduce = Literal["butterfly", "gather", "ring", "tree"]
"""The all-reduce algorithms a rule can name."""

ALL_REDUCE: dict[str, Callable[[Peer, Tensor, Codec, Attempt], Awaitable[Tensor]]] = {
    "butterfly": butterfly_mean,
    "gather": gather_mean,
    "ring": ring_mean,
    "tree": tree_mean,
}
FOLDING = frozenset({"butterfly", "gather"})
"""Those in which somebody holds all contributions: they know weights, and can refuse one contribution alone."""


def require_dense(codec: Codec) -> None:
    """Raise `ConfigError` for a codec by which parameters themselves cannot travel, as `exchange` lets them."""
    if codec.loss in ("contractive", "unbiased") or isinstance(codec, Wrapper):
        raise ConfigError(
            f"rule.codec: '{codec.spelling()}' is for updates, and this rule sends parameters, which must arrive "
            "whole; choose a codec that keeps every element, such as 'bf16' or 'int8'"
        )


async def exchange(
    peer: Peer, links: Links, values: Tensor, codec: Codec, *, channel: str = "pair", round_: int
) -> dict[int, Tensor] | None:
    """Send `values` `[n]` along the links and return what came, by worker; None when the exchange failed.

    See `conclude` for when it fails and what that costs.
    """
    offer(peer, links, values, codec, Tag(channel, round_, "x"))
    heard = await conclude(peer, links, ("x",), values, codec, channel=channel, round_=round_)
    return None if heard is None else heard[0]


def offer(peer: Peer, links: Links, values: Tensor, codec: Codec, tag: Tag) -> None:
    """Start sending `values` `[n]` along the links: one part of an exchange that `conclude` ends, maybe much later.

    What the worker has trained on by the last part goes into the exchange.
    """
    peer.hands_in(_given(tag.channel), tag.round)
    packet = codec.encode(values)
    for to in links.to:
        peer.send(to, tag, packet)


async def conclude(
    peer: Peer, links: Links, parts: Sequence[str], like: Tensor, codec: Codec, *, channel: str, round_: int
) -> list[dict[int, Tensor]] | None:
    """Return what was offered to us, for each part by worker, or None: an exchange of all parts, or of none.

    Both sides say whether they heard everything before either uses it: between live workers an exchange over two-way
    links is applied by both or by neither, if all that the two hear is from each other or from one closed group. A
    failed one costs at most two deadlines and ends as a skipped round. `like` is a vector as long as what was sent.
    """
    peer.decline(channel, functools.partial(_decline, peer, links, round_))
    verdict = Tag(channel, round_, "v")
    heard: list[dict[int, Tensor]] = [{} for _ in parts]
    whole = True
    deadline = peer.now() + peer.patience_s
    try:
        for part, by_worker in zip(parts, heard, strict=True):
            for source in links.source:
                packet = (await peer.recv(source, Tag(channel, round_, part), deadline - peer.now()))[1]
                if packet.codec == SIGNAL:
                    raise PeerGone(f"worker {source} has other partners in this round")
                try:
                    by_worker[source] = codec.decode(packet, like)
                except FrameError as error:
                    peer.refuse(source, error)
                    raise
    except (PeerGone, TimeoutError, FrameError):
        whole = False
    answer = signal("ok" if whole else "no")
    told = [peer.send(source, verdict, answer) for source in links.source]
    deadline = peer.now() + peer.patience_s
    try:
        for to in links.to:
            whole = whole and signal_text((await peer.recv(to, verdict, deadline - peer.now()))[1]) == "ok"
    except (PeerGone, TimeoutError, FrameError):
        whole = False
    together = sorted({peer.id, *links.to, *links.source})
    peer.ended_round(channel, round_, "committed" if whole else "skipped", together)
    peer.taken_up(_given(channel), round_, told if whole else ())
    return heard if whole else None


def _decline(peer: Peer, links: Links, round_: int, source: int, tag: Tag) -> None:
    """Tell who has offered us something in vain that nothing comes back: it may know other members than we did."""
    if tag.round == round_ and source in links.source:
        return  # it has our verdict
    for name in (tag.part, "v"):
        peer.send(source, Tag(tag.channel, tag.round, name), signal("no"))


def _given(channel: str) -> str:
    """Return the name for what is given to others on a channel: they have it when our verdict has come, not before."""
    return f"given {channel}"
