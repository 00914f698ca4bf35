"""What a stranger's bytes may come to: the target of every fuzzer, honest frames to begin with, and ways to spoil them.

A frame is written as one string of bytes: which codec the receiver expects (1 byte), the length of the header (2 bytes,
little-endian), the header, the payload.
"""

from __future__ import annotations

import random
import struct
from typing import Any

import msgpack
import torch

from decentral.protocols import CODECS, Codec, Int8
from decentral.protocols.codecs import Wrapper
from decentral.wire import SIGNAL, FrameError, Header, Packet, Tag, pack_header, signal, signal_text, unpack_header

SHAPES = ((24, 30), (13,))
"""Tensors of the vector that the receiver expects: two blocks of most codecs and a rest, a matrix and a vector."""
NUMEL = 24 * 30 + 13
MAX_BYTES = 1 << 16
"""The largest packet of the receiver's run."""
ACCEPTED = "accepted"
TAG = Tag("sync", 17, "0.2.g")


def codec_of(cls: type[Codec]) -> Codec:
    """Return a codec of the class with its defaults, around int8 if it is a wrapper, for vectors of `SHAPES`."""
    codec = cls(codec=Int8()) if issubclass(cls, Wrapper) else cls()
    return codec.fit(SHAPES)


RECEIVERS = {name: codec_of(cls) for name, cls in CODECS.items()}
NAMES = (*RECEIVERS, SIGNAL)


def frame(expected: str, header: bytes, payload: bytes) -> bytes:
    """Return the frame as one string of bytes."""
    return struct.pack("<BH", NAMES.index(expected), len(header)) + header + payload


def judge(data: bytes) -> str:
    """Receive a frame and return why it was refused, or `ACCEPTED`. Whatever else happens, it raises.

    `AssertionError`: what was accepted is not a finite vector of the size that was asked for.
    """
    try:
        receive(data)
    except FrameError as error:
        return error.code
    return ACCEPTED


def receive(data: bytes) -> None:
    """Do what a worker does with a frame, from its first byte to the decoded vector. Raises `FrameError`."""
    if len(data) < 3:
        raise FrameError("header", "no frame")
    choice, length = struct.unpack_from("<BH", data)
    expected = NAMES[choice % len(NAMES)]
    header, payload = unpack_header(data[3 : 3 + length]), data[3 + length :]
    if header.nbytes > MAX_BYTES:
        raise FrameError("too_large", f"a packet of {header.nbytes} bytes")
    if header.nbytes != len(payload):
        raise FrameError("length", f"{len(payload)} bytes came of {header.nbytes}")
    taken = torch.empty(header.nbytes, dtype=torch.uint8)
    view: Any = taken.numpy()
    memoryview(view)[:] = payload
    packet = Packet(header.codec, header.numel, header.nbytes, taken, header.weight)
    if expected == SIGNAL:
        assert len(signal_text(packet)) == header.nbytes
        return
    like = torch.empty(NUMEL)
    values = RECEIVERS[expected].decode(packet, like)
    assert values.shape == like.shape
    assert values.dtype == torch.float32
    assert bool(torch.isfinite(values).all()), expected


def honest() -> list[bytes]:
    """Return frames that a member might send: of every codec, vectors small, large, sparse, constant and mixed."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(NUMEL, generator=generator)
    vectors = [normal, 1e-38 * normal, 1e30 * normal, torch.zeros(NUMEL), normal * (normal > 2), torch.ones(NUMEL)]
    frames = []
    for name, codec in RECEIVERS.items():
        packets = [codec.encode(values) for values in vectors]
        frames += [frame(name, *_sent(packet)) for packet in packets]
    return [*frames, *[frame(SIGNAL, *_sent(signal(text))) for text in ("", "ok", "a longer one")]]


def _sent(packet: Packet) -> tuple[bytes, bytes]:
    header = pack_header(Header(3, 1, TAG, packet.codec, packet.numel, packet.nbytes, packet.weight))
    return header, b"" if packet.payload is None else bytes(packet.payload.tolist())


# -- spoiling ----------------------------------------------------------------------------------------------------------

NUMBERS = (
    0,
    1,
    -1,
    2,
    127,
    128,
    255,
    NUMEL - 1,
    NUMEL,
    NUMEL + 1,
    1 << 31,
    1 << 36,
    (1 << 53) + 1,
    1 << 63,
    -(1 << 63),
)
VALUES: tuple[Any, ...] = (*NUMBERS, True, None, 0.5, float("nan"), "", "int8", "ä" * 400, b"x", [], {}, [[[]]])
FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, -0.0, 3e38, 1e-45)
WORDS = (*[struct.pack("<f", value) for value in FLOATS], b"\xff" * 4, b"\x00\x00\x00\x80", b"\xff\xff\xff\x7f")


def spoiled(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Return the frame with one to four things wrong with it; `other` is a frame to mix it with."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        data = draw.choice(_WAYS)(data, other, draw)
    return data


def _flip(data: bytes, _other: bytes, draw: random.Random) -> bytes:
    """Flip a bit: of the header as often as of the payload, which is much longer."""
    place = draw.randrange(draw.choice((48, len(data))) if len(data) > 48 else len(data) or 1)
    return data[:place] + bytes(byte ^ 1 << draw.randrange(8) for byte in data[place : place + 1]) + data[place + 1 :]


def _byte(data: bytes, _other: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data) + 1)
    return data[:place] + bytes([draw.choice((0, 1, 127, 128, 129, 254, 255, 0xC1))]) + data[place + 1 :]


def _word(data: bytes, _other: bytes, draw: random.Random) -> bytes:
    """Write a hostile float32 where one may stand: at a multiple of four in the payload, its beginning above all."""
    start = _payload_start(data)
    words = max(1, (len(data) - start) // 4)
    place = start + 4 * draw.randrange(min(words, draw.choice((4, words))))
    return data[:place] + draw.choice(WORDS) + data[place + 4 :]


def _cut(data: bytes, _other: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _longer(data: bytes, other: bytes, draw: random.Random) -> bytes:
    return data + other[: draw.randrange(1, 64)]


def _splice(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Put another frame's payload behind this one's header, or another header before this payload."""
    return data[: _payload_start(data)] + other[_payload_start(other) :]


def _field(data: bytes, _other: bytes, draw: random.Random) -> bytes:
    """Put something else into a field of the header, and keep it msgpack."""
    start = _payload_start(data)
    try:
        fields = msgpack.unpackb(data[3:start])
    except Exception:
        return data
    if not isinstance(fields, list) or not fields:
        return data
    fields[draw.randrange(len(fields))] = draw.choice(VALUES)
    header: bytes = msgpack.packb(fields)
    return data[:1] + struct.pack("<H", len(header)) + header + data[start:]


def _expectation(data: bytes, _other: bytes, draw: random.Random) -> bytes:
    return bytes([draw.randrange(256)]) + data[1:]


_WAYS = (*[_flip, _byte, _word] * 3, *[_splice, _field] * 2, _cut, _longer, _expectation)
"""Those that leave all lengths as they are come more often: they get furthest."""


def _payload_start(data: bytes) -> int:
    return min(len(data), 3 + (struct.unpack_from("<H", data, 1)[0] if len(data) >= 3 else 0))
