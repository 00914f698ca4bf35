"""XOR parity over groups of workers: one that is lost gets back what was its alone, without storage.

Rules with equal replicas keep parameters, anchors and outer state on every worker; the inner optimiser's moments, a
codec's residuals and running statistics are each worker's own, and go with it. So every now and then a group of k
workers, best on k different machines, makes parity of them, as REFT does (arXiv 2310.12670) and RAID-5 before it. Each
keeps a copy of its own L bytes and cuts it into k - 1 stripes, one for each other member; with s_ij worker i's one to j

    parity_j = XOR_(i != j) s_ij;        worker i is lost:   s_ij = parity_j XOR XOR_(m != i, j) s_mj   for all j

Whichever worker is lost, the others rebuild its bytes, one stripe each. A generation costs a worker L bytes sent, L
received and L k / (k - 1) of memory; two are kept beside the one under way, for the last one may not be whole
everywhere. A rebuild costs each survivor L bytes sent: a stripe to each other one, and one to who was lost. Two lost at
once cannot be rebuilt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decentral.errors import PeerGone
from decentral.peer import Peer
from decentral.replica import digest
from decentral.wire import FrameError, Packet, Tag, signal, signal_text

CHANNEL = "parity"
ASK = Tag("parity ask", 0)
PASSED_OVER = ""
"""What a worker says in place of what its state is, if it takes no part in a generation."""
BYTES = "bytes"
"""Codec name of packets that carry bytes as they are."""
WORD = 8
"""Bytes that are XOR-ed as one number."""
SEGMENT = 1 << 20
"""Bytes of a packet, if the model is not larger: a packet may never be much larger than the model."""


def parity_groups(workers: Sequence[int], size: int, places: Mapping[int, str]) -> list[tuple[int, ...]]:
    """Return groups of `size` workers or a few more, those at one place (a machine, a site) as far apart as can be."""
    ordered = sorted(workers, key=lambda worker: (places.get(worker, ""), worker))
    count = max(1, len(ordered) // size)
    return [tuple(sorted(ordered[group::count])) for group in range(count)]


@dataclass(frozen=True)
class _Generation:
    """What a worker keeps of one generation: its own bytes, what all members' bytes are, and its stripe of parity."""

    own: Tensor
    heads: dict[int, str]
    parity: Tensor


class Parity:
    """One worker's part in its group's parity. `group`: at least two workers, ascending, `peer` among them.

    `protection.Guard` calls it beside a rule.
    """

    def __init__(self, peer: Peer, group: tuple[int, ...]) -> None:
        self._peer, self._group = peer, group
        self._others = [member for member in group if member != peer.id]
        self._kept: dict[int, _Generation] = {}
        self._newest = 0
        self._under_way = 0
        peer.decline(CHANNEL, lambda source, tag: None)  # when somebody dies, what others have sent already is in vain

    def protect(self, number: int) -> Coroutine[Any, Any, bool]:
        """Copy the worker's own state for generation `number` (1, 2, ...), at once: call it at rest.

        What it returns makes parity of the copy, awaited or spawned beside training, and returns whether the generation
        is whole here; if not, the last one stays.
        """
        return self._make(number, *_packed(self._peer, len(self._others)))

    def pass_over(self, number: int) -> None:
        """Make no generation `number`, and tell the others: they need not wait for us."""
        self._newest = max(self._newest, number)
        for other in self._others:
            self._peer.send(other, Tag(CHANNEL, number, "head"), signal(PASSED_OVER))
        if not self._under_way:
            self._peer.close(CHANNEL, self._newest)

    async def _make(self, number: int, head: str, own: Tensor) -> bool:
        peer = self._peer
        heads, parity = {peer.id: head}, torch.zeros(0, dtype=torch.uint8)
        self._newest, self._under_way = max(self._newest, number), self._under_way + 1
        try:
            for other in self._others:
                peer.send(other, Tag(CHANNEL, number, "head"), signal(head))
            for other in self._others:  # first, so that nobody sends its bytes in vain
                heads[other] = await self._text(other, Tag(CHANNEL, number, "head"))
                if heads[other] == PASSED_OVER:
                    return False
            for place, other in enumerate(self._others):
                self._send(other, CHANNEL, number, own, place)
            for other in self._others:
                stripe = await self._stripe(other, CHANNEL, number, self._stripe_bytes(heads[other]))
                parity = _xor(parity, stripe)
        except (PeerGone, TimeoutError):
            return False
        except FrameError as error:
            peer.refuse(other, error)
            return False
        finally:
            self._under_way -= 1
            if not self._under_way:
                peer.close(CHANNEL, self._newest)
        self._kept[number] = _Generation(own, heads, parity)
        for old in sorted(self._kept)[:-2]:
            del self._kept[old]
        return True

    async def serve(self) -> None:
        """Help whoever of the group has lost its state, for ever: spawn it beside the rule."""
        while True:
            lost, packet = await self._peer.recv(None, ASK, math.inf)
            if lost in self._others:
                self._peer.spawn(self._help(lost, packet))

    async def rebuild(self) -> int:
        """Have `peer`, a newcomer that the group has lost, be what it was alone at the newest generation all have.

        Returns that generation's number. Raises `PeerGone` if more than one of the group is lost, or nobody has made
        parity; nothing has changed then.
        """
        self._require_all_others()
        peer = self._peer
        attempt = len(peer.everybody.departed)
        channel = _rebuilding(peer.id)
        try:
            for other in self._others:
                peer.send(other, ASK, signal(str(attempt)))
            known = [_numbers(await self._text(other, Tag(channel, attempt, "have"))) for other in self._others]
            common = set.intersection(*known)
            for other in self._others:
                peer.send(other, Tag(channel, attempt, "take"), signal(str(max(common, default=0))))
            if not common:
                raise PeerGone(f"the group {list(self._group)} has no generation of parity that all of it know")
            heads = [await self._text(other, Tag(channel, attempt, "head")) for other in self._others]
            if len(set(heads)) > 1:
                raise FrameError("header", "its members do not say the same of what was lost")
            size = self._stripe_bytes(heads[0])
            stripes = [await self._stripe(other, channel, attempt, size) for other in self._others]
            _unpack(peer, heads[0], torch.cat([stripe[:size] for stripe in stripes]))
            return max(common)
        except PeerGone:
            self._require_all_others()
            raise
        except (TimeoutError, FrameError) as error:
            raise PeerGone(f"the group {list(self._group)} could not bring back worker {peer.id}: {error}") from None
        finally:
            peer.close(channel, attempt)

    def _require_all_others(self) -> None:
        missing = [member for member in self._others if member not in self._peer.everybody]
        if missing:
            raise PeerGone(
                f"parity brings back one lost worker of a group, and of {list(self._group)} worker {self._peer.id} is "
                f"not the only one: {missing} are gone too"
            )

    async def _help(self, lost: int, packet: Packet) -> None:
        peer, channel = self._peer, _rebuilding(lost)
        try:
            attempt = int(signal_text(packet))
            peer.send(lost, Tag(channel, attempt, "have"), signal(json.dumps(sorted(self._kept))))
            number = int(await self._text(lost, Tag(channel, attempt, "take")))
            kept = self._kept.get(number)
            if kept is None:
                return
            survivors = [member for member in self._others if member != lost]
            for member in survivors:
                self._send(member, channel, attempt, kept.own, self._others.index(member))
            rebuilt = kept.parity
            for member in survivors:
                size = self._stripe_bytes(kept.heads[member])
                rebuilt = _xor(rebuilt, await self._stripe(member, channel, attempt, size))
            peer.send(lost, Tag(channel, attempt, "head"), signal(kept.heads[lost]))
            self._send_stripe(lost, channel, attempt, rebuilt[: self._stripe_bytes(kept.heads[lost])])
            peer.close(channel, attempt)
        except FrameError as error:
            peer.refuse(lost, error)
        except (PeerGone, TimeoutError, ValueError):
            return  # whoever is lost will be told by its own deadline

    # -- stripes on the wire -----------------------------------------------------------------------------------------

    @property
    def _segment(self) -> int:
        return max(SEGMENT, 4 * self._peer.layout.size)

    def _stripe_bytes(self, head: str) -> int:
        return _padded(_fields(head)["bytes"], len(self._others)) // len(self._others)

    def _send(self, to: int, channel: str, number: int, own: Tensor, place: int) -> None:
        """Send the stripe of our own bytes that is the receiver's, the `place`-th."""
        size = len(own) // len(self._others)
        self._send_stripe(to, channel, number, own[place * size : (place + 1) * size])

    def _send_stripe(self, to: int, channel: str, number: int, stripe: Tensor) -> None:
        for start in range(0, len(stripe), self._segment):
            part = stripe[start : start + self._segment]
            self._peer.send(to, Tag(channel, number, f"at {start}"), Packet(BYTES, len(part), len(part), part))

    async def _stripe(self, source: int, channel: str, number: int, size: int) -> Tensor:
        """Return a stripe of `size` bytes from `source`. Raises `PeerGone`, `TimeoutError` or `FrameError`."""
        parts = [torch.zeros(0, dtype=torch.uint8)]
        for start in range(0, size, self._segment):
            _, packet = await self._peer.recv(source, Tag(channel, number, f"at {start}"))
            wanted = min(self._segment, size - start)
            if packet.codec != BYTES or packet.nbytes != wanted or packet.payload is None:
                raise FrameError("length", f"{packet.nbytes} bytes of '{packet.codec}' where {wanted} of parity belong")
            parts.append(packet.payload)
        return torch.cat(parts)

    async def _text(self, source: int, tag: Tag) -> str:
        return signal_text((await self._peer.recv(source, tag))[1])


def _rebuilding(lost: int) -> str:
    return f"parity of {lost}"


def _numbers(text: str) -> set[int]:
    """Return the generations that somebody says it has; raises `FrameError` if it says nothing of the kind."""
    try:
        numbers = json.loads(text)
    except ValueError:
        numbers = None
    if not isinstance(numbers, list) or any(type(number) is not int or number < 1 for number in numbers):
        raise FrameError("header", f"{text[:40]!r} where generations belong")
    return set(numbers)


def _fields(head: str) -> dict[str, Any]:
    """Return what `_packed` said of a state; raises `FrameError` for what it never says."""
    try:
        fields: dict[str, Any] = json.loads(head)
        numbers = [fields["bytes"], fields["digest"], fields["inner_steps"]]
        numbers += [size for _name, _dtype, *shape in fields["tensors"] for size in shape]
        kinds = [getattr(torch, dtype) for _name, dtype, *_shape in fields["tensors"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FrameError("header", f"{head[:40]!r} where a state should be described") from None
    if any(type(number) is not int or number < 0 for number in numbers):
        raise FrameError("header", "a state is described with a number out of range")
    if any(not isinstance(kind, torch.dtype) for kind in kinds):
        raise FrameError("header", "a state is described with a type that no tensor has")
    return fields


def _padded(nbytes: int, stripes: int) -> int:
    """Return the size at which so many bytes are cut into equal stripes of whole words."""
    return -(-nbytes // (WORD * stripes)) * WORD * stripes


def _xor(one: Tensor, other: Tensor) -> Tensor:
    """Return the XOR of two vectors of bytes, the shorter one as if zeros followed."""
    if len(one) < len(other):
        one, other = other, one
    result = one.clone()
    words = result[: len(other)].view(torch.int64)
    words.bitwise_xor_(other.contiguous().view(torch.int64))
    return result


def _packed(peer: Peer, stripes: int) -> tuple[str, Tensor]:
    """Return what a worker's own state is, as JSON, and a copy of its bytes, padded for so many stripes."""
    state = peer.own_state()
    flat = [values.detach().cpu().reshape(-1).view(torch.uint8) for values in state.values()]
    nbytes = sum(len(each) for each in flat)
    own = torch.cat([*flat, torch.zeros(_padded(nbytes, stripes) - nbytes, dtype=torch.uint8)])
    head = {
        "bytes": nbytes,
        "digest": digest([own]),
        "inner_steps": peer.replica.inner_steps,
        "tensors": [[name, str(values.dtype).removeprefix("torch."), *values.shape] for name, values in state.items()],
    }
    return json.dumps(head), own


def _unpack(peer: Peer, head: str, own: Tensor) -> None:
    """Have the worker's own state be what was packed; raises `FrameError` if these are other bytes."""
    fields = _fields(head)
    if digest([own]) != fields["digest"]:
        raise FrameError("length", "the rebuilt bytes are not what was lost")
    state: dict[str, Tensor] = {}
    place = 0
    for name, dtype, *shape in fields["tensors"]:
        kind = getattr(torch, dtype)
        stop = place + math.prod(shape) * kind.itemsize
        if stop > fields["bytes"]:
            raise FrameError("length", "a state is described with more elements than it has bytes")
        state[name] = own[place:stop].clone().view(kind).view(shape)
        place = stop
    peer.restore_own(state, fields["inner_steps"])
