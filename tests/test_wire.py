"""Headers and signals: what is packed can be read, and nothing else can."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
import torch

from decentral.wire import (
    MAX_HEADER_BYTES,
    MAX_PACKET_BYTES,
    FrameError,
    Header,
    Packet,
    Tag,
    pack_header,
    signal,
    signal_text,
    unpack_header,
)

GOOD = Header(3, 1, Tag("sync", 17, "0.2.g"), "int8", 1000, 1016)
FIELDS = (3, 1, "sync", 17, "0.2.g", "int8", 1000, 1016)


@pytest.mark.parametrize(
    "header",
    [
        GOOD,
        Header(0, 0, Tag("", 0), "", 0, 0),
        Header(2**40, 2**31, Tag("fragment 12 äö", 2**50, "x"), "my.module:Codec", 2**40, MAX_PACKET_BYTES),
    ],
)
def test_a_header_survives_the_trip(header: Header) -> None:
    read = unpack_header(pack_header(header))
    assert read == header
    assert isinstance(read.tag, Tag)


def test_a_header_is_msgpack_of_its_fields() -> None:
    assert msgpack.unpackb(pack_header(GOOD), use_list=False) == FIELDS


def changed(place: int, value: Any) -> bytes:
    fields: list[Any] = list(FIELDS)
    fields[place] = value
    packed: bytes = msgpack.packb(fields)
    return packed


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (pack_header(GOOD)[:-1], "not msgpack"),
        (pack_header(GOOD) + b"\x00", "not msgpack"),
        (msgpack.packb({"source": 3}), "8 fields"),
        (msgpack.packb(FIELDS[:-1]), "8 fields"),
        (msgpack.packb((*FIELDS, 0)), "8 fields"),
        (msgpack.packb("sync"), "8 fields"),
        (changed(0, "3"), "8 fields"),
        (changed(0, 3.0), "8 fields"),
        (changed(0, True), "8 fields"),
        (changed(2, b"sync"), "8 fields"),
        (changed(2, None), "8 fields"),
        (changed(6, [1]), "8 fields"),
        (changed(0, -1), "out of range"),
        (changed(1, -1), "out of range"),
        (changed(3, -1), "out of range"),
        (changed(6, -1), "out of range"),
        (changed(7, -1), "out of range"),
        (changed(7, MAX_PACKET_BYTES + 1), "out of range"),
        (changed(2, "s" * MAX_HEADER_BYTES), f"at most {MAX_HEADER_BYTES}"),
        (msgpack.packb(["\ud800".encode("utf-8", "surrogatepass")] * 8), "8 fields"),
        (b"\x98\x03\x01\xa4\xff\xfe\xfd\xfc\x11\xa0\xa0\x00\x00", "not msgpack"),
        (b"\x91" * 1000 + b"\x00", "not msgpack|8 fields"),
    ],
)
def test_anything_else_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        unpack_header(data)


def test_random_bytes_are_refused_or_read_and_never_crash() -> None:
    generator = torch.Generator().manual_seed(0)
    for length in range(1, 200):
        data = bytes(torch.randint(0, 256, (length,), generator=generator).tolist())
        with pytest.raises(FrameError):
            unpack_header(data)


@pytest.mark.parametrize("text", ["", "ok", "no", "a longer one"])
def test_a_signal_carries_its_text(text: str) -> None:
    packet = signal(text)
    assert signal_text(packet) == text
    assert packet.nbytes == len(text)


def test_what_is_no_signal_is_refused() -> None:
    with pytest.raises(FrameError, match="got a packet of codec 'float32'"):
        signal_text(Packet("float32", 1, 4, torch.zeros(4, dtype=torch.uint8)))


def test_bytes_that_are_no_ascii_do_not_crash() -> None:
    assert signal_text(Packet("signal", 0, 2, torch.tensor([255, 111], dtype=torch.uint8))).endswith("o")
