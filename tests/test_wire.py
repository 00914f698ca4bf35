"""Headers and signals: what is packed can be read, and nothing else can."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
import torch

from decentral.wire import (
    MAX_HEADER_BYTES,
    MAX_PACKET_BYTES,
    MAX_SIGNAL_BYTES,
    MAX_WEIGHT,
    FrameError,
    Header,
    HeaderSizes,
    Packet,
    Tag,
    pack_header,
    signal,
    signal_text,
    unpack_header,
)

GOOD = Header(3, 1, Tag("sync", 17, "0.2.g"), "int8", 1000, 1016, 8192)
FIELDS = (3, 1, "sync", 17, "0.2.g", "int8", 1000, 1016, 8192)


@pytest.mark.parametrize(
    "header",
    [
        GOOD,
        Header(0, 0, Tag("", 0), "", 0, 0),
        Header(2**40, 2**31, Tag("fragment 12 äö", 2**50, "x"), "my.module:Codec", 2**40, MAX_PACKET_BYTES, MAX_WEIGHT),
    ],
)
def test_a_header_survives_the_trip(header: Header) -> None:
    read = unpack_header(pack_header(header))
    assert read == header
    assert isinstance(read.tag, Tag)


def test_a_header_is_msgpack_of_its_fields() -> None:
    assert msgpack.unpackb(pack_header(GOOD), use_list=False) == FIELDS


def test_a_header_is_as_long_as_it_is_said_to_be() -> None:
    sizes = HeaderSizes()
    for weight in (1, 200, MAX_WEIGHT):
        packet = Packet("int8", 1000, 1016, None, weight)
        header = Header(3, 0, GOOD.tag, packet.codec, packet.numel, packet.nbytes, weight)
        assert sizes.size(3, GOOD.tag, packet) == len(pack_header(header))


def changed(place: int, value: Any) -> bytes:
    fields: list[Any] = list(FIELDS)
    fields[place] = value
    packed: bytes = msgpack.packb(fields)
    return packed


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (b"", "header", "not msgpack"),
        (b"\xc1", "header", "not msgpack"),
        (pack_header(GOOD)[:-1], "header", "not msgpack"),
        (pack_header(GOOD) + b"\x00", "header", "not msgpack"),
        (msgpack.packb({"source": 3}), "header", "9 fields"),
        (msgpack.packb(FIELDS[:-1]), "header", "9 fields"),
        (msgpack.packb((*FIELDS, 0)), "header", "9 fields"),
        (msgpack.packb("sync"), "header", "9 fields"),
        (changed(0, "3"), "header", "9 fields"),
        (changed(0, 3.0), "header", "9 fields"),
        (changed(0, True), "header", "9 fields"),
        (changed(2, b"sync"), "header", "9 fields"),
        (changed(2, None), "header", "9 fields"),
        (changed(6, [1]), "header", "9 fields"),
        (changed(8, 1.0), "header", "9 fields"),
        (changed(0, -1), "header", "out of range"),
        (changed(1, -1), "header", "out of range"),
        (changed(3, -1), "header", "out of range"),
        (changed(6, -1), "header", "out of range"),
        (changed(7, -1), "header", "out of range"),
        (changed(8, 0), "header", "out of range"),
        (changed(8, -1), "header", "out of range"),
        (changed(8, MAX_WEIGHT + 1), "header", "out of range"),
        (changed(7, MAX_PACKET_BYTES + 1), "too_large", f"at most {MAX_PACKET_BYTES}"),
        (changed(2, "s" * MAX_HEADER_BYTES), "header", f"at most {MAX_HEADER_BYTES}"),
        (b"\x99\xcd\x00\x03" + pack_header(GOOD)[2:], "header", "spelled"),  # 3 in two bytes
        (b"\xdc\x00\x09" + pack_header(GOOD)[1:], "header", "spelled"),
        (msgpack.packb(["\ud800".encode("utf-8", "surrogatepass")] * 9), "header", "9 fields"),
        (b"\x99\x03\x01\xa4\xff\xfe\xfd\xfc\x11\xa0\xa0\x00\x00\x01", "header", "not msgpack"),
        (b"\x91" * 1000 + b"\x00", "header", "not msgpack|9 fields"),
        (b"\xdd\xff\xff\xff\xff", "header", "not msgpack"),
        (b"\xc6\xff\xff\xff\xff", "header", "not msgpack"),
    ],
)
def test_anything_else_is_refused(data: bytes, code: str, message: str) -> None:
    with pytest.raises(FrameError, match=message) as refused:
        unpack_header(data)
    assert refused.value.code == code


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
    with pytest.raises(FrameError, match="got a packet of codec 'float32'") as refused:
        signal_text(Packet("float32", 1, 4, torch.zeros(4, dtype=torch.uint8)))
    assert refused.value.code == "codec"
    with pytest.raises(FrameError, match=r"'\\x1b\[2J\\n'"):  # a terminal that shows the message takes no orders
        signal_text(Packet("\x1b[2J\n", 0, 0, None))
    with pytest.raises(FrameError, match=f"at most {MAX_SIGNAL_BYTES}") as refused:
        signal_text(Packet("signal", 0, MAX_SIGNAL_BYTES + 1, torch.zeros(MAX_SIGNAL_BYTES + 1, dtype=torch.uint8)))
    assert refused.value.code == "too_large"


def test_bytes_that_are_no_ascii_do_not_crash() -> None:
    assert signal_text(Packet("signal", 0, 2, torch.tensor([255, 111], dtype=torch.uint8))).endswith("o")
