"""What travels: packets, the tags that name them, and the header both worlds put in front of them.

A frame is a msgpack header followed by the packet's raw bytes. Nothing is ever unpickled. The simulator builds the same
headers, so both worlds count the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import msgpack
import torch
from torch import Tensor

MAX_HEADER_BYTES = 1024
MAX_PACKET_BYTES = 1 << 36
MAX_SIGNAL_BYTES = 1 << 16
MAX_WEIGHT = 1 << 53


class Tag(NamedTuple):
    """Names a message among those between two workers: a channel, a round on it, and a part of that round."""

    channel: str
    round: int
    part: str = ""


@dataclass(slots=True, eq=False)
class Packet:
    """An encoded vector of `numel` elements: `payload` is `[nbytes]` uint8 on the CPU, None in timing-only mode.

    `weight` is how much it counts in a weighted mean: the samples or tokens it stands for, as its sender says.
    What does not travel: whether somebody here has `read` it, and what was `decoded` then for those who read it next.
    """

    codec: str
    numel: int
    nbytes: int
    payload: Tensor | None
    weight: int = 1
    read: bool = field(default=False, repr=False)
    decoded: Tensor | None = field(default=None, repr=False)


Refusal = Literal[
    "header",  # no header that `pack_header` writes, or a number in it is out of range
    "too_large",  # more bytes declared than any packet of the run has
    "length",  # other sizes than declared, or than were agreed on
    "codec",  # another codec than was agreed on, or bytes that it never writes
    "scale",  # a scale that is negative or not finite
    "index",  # an index out of range, or twice
    "not_finite",  # decodes to NaN or infinity
    "norm",  # a norm that is absurd beside those of the others
    "stale",  # a round that is over: late, or replayed
    "future",  # a round that nobody can have come to
    "duplicate",  # a second packet of the same name from the same worker
    "unclaimed",  # more bytes than we can keep for later
]
"""Why a frame was refused."""


class FrameError(ValueError):
    """A frame from the network that is not what it says, or not what was agreed on. The peer's fault, never ours."""

    def __init__(self, code: Refusal, message: str) -> None:
        super().__init__(message)
        self.code = code


class Header(NamedTuple):
    """Everything about a frame but its payload."""

    source: int
    incarnation: int
    tag: Tag
    codec: str
    numel: int
    nbytes: int
    weight: int = 1


def pack_header(header: Header) -> bytes:
    """Return the header as msgpack: [source, incarnation, channel, round, part, codec, numel, nbytes, weight]."""
    packed: bytes = msgpack.packb((header.source, header.incarnation, *header.tag, *header[3:]))
    return packed


class HeaderSizes:
    """Tells how long headers are without keeping them. One for each thread: packers are not thread-safe."""

    def __init__(self) -> None:
        self._pack = msgpack.Packer().pack

    def size(self, source: int, tag: Tag, packet: Packet) -> int:
        """Return `len(pack_header(...))` of a frame that carries `packet`, in a fifth of the time."""
        return len(self._pack((source, 0, *tag, packet.codec, packet.numel, packet.nbytes, packet.weight)))


def unpack_header(data: bytes) -> Header:
    """Read a header that came from the network; raises `FrameError` on anything but what `pack_header` makes."""
    if len(data) > MAX_HEADER_BYTES:
        raise FrameError("header", f"header of {len(data)} bytes; at most {MAX_HEADER_BYTES} are allowed")
    try:
        fields = msgpack.unpackb(data, use_list=False, strict_map_key=True)
    except Exception as error:
        raise FrameError("header", f"header is not msgpack: {error}") from error
    kinds = (int, int, str, int, str, str, int, int, int)
    if not isinstance(fields, tuple) or [type(field) for field in fields] != list(kinds):
        raise FrameError("header", f"header is not {len(kinds)} fields of the kinds that `pack_header` writes")
    source, incarnation, channel, round_, part, codec, numel, nbytes, weight = fields
    if min(source, incarnation, round_, numel, nbytes) < 0 or not 1 <= weight <= MAX_WEIGHT:
        raise FrameError("header", f"header has a number out of range: {fields}")
    if nbytes > MAX_PACKET_BYTES:
        raise FrameError("too_large", f"header declares {nbytes} bytes; at most {MAX_PACKET_BYTES} are allowed")
    header = Header(source, incarnation, Tag(channel, round_, part), codec, numel, nbytes, weight)
    if pack_header(header) != data:  # msgpack has several spellings of a number, and both worlds count bytes
        raise FrameError("header", "header is spelled in another way than `pack_header` spells it")
    return header


SIGNAL = "signal"
"""Codec name of packets that carry a short text and no vector (acknowledgements)."""


def largest_packet(numel: int) -> int:
    """Return how many bytes no honest packet has where the longest vector has so many elements.

    That is twice that vector in float32, and some room for small models.
    """
    return 8 * numel + (1 << 20)


@lru_cache(maxsize=64)
def signal(text: str) -> Packet:
    """Return a packet that carries `text` (ASCII): always the same one, which nobody must change."""
    data = text.encode("ascii")
    return Packet(SIGNAL, 0, len(data), torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else None)


def signal_text(packet: Packet) -> str:
    """Return what `signal` was given; raises `FrameError` for any other packet."""
    if packet.codec != SIGNAL:
        raise FrameError("codec", f"expected a signal, got a packet of codec {packet.codec!r}")
    if packet.nbytes > MAX_SIGNAL_BYTES:
        raise FrameError("too_large", f"a signal of {packet.nbytes} bytes; at most {MAX_SIGNAL_BYTES} are allowed")
    return _text(packet)


@lru_cache(maxsize=64)
def _text(packet: Packet) -> str:
    return "" if packet.payload is None else bytes(packet.payload.tolist()).decode("ascii", "replace")
