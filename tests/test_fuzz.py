"""Hostile frames: whatever bytes come, they are read or refused, at a cost that what they declare bounds."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from decentral.wire import (
    MAX_HEADER_BYTES,
    MAX_PACKET_BYTES,
    MAX_WEIGHT,
    SIGNAL,
    FrameError,
    Header,
    Tag,
    pack_header,
    unpack_header,
)
from fuzz import frames

quick = settings(
    max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
few = settings(quick, max_examples=25)

HEADER_MEMORY = 320 << 10
"""Bytes of Python's memory that reading a header may take, whatever it declares; msgpack's packer has 256 KiB."""
DECODE_MEMORY = 64 * 4 * frames.NUMEL + (1 << 20)
"""Bytes that decoding may take: some vectors of the size that the receiver asked for, and tables."""
DECODE_OPERATIONS = 2000


class Cost(TorchFunctionMode):
    """Counts what is asked of torch: operations, and the bytes of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.largest = 0, 0

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.untyped_storage().nbytes())
        return result


def read(data: bytes) -> Header | None:
    """Return the header; None if it was refused. Fails if it took more memory than any header may."""
    tracemalloc.start()
    header, refusal = None, None
    try:
        header = unpack_header(data)
    except FrameError as error:
        refusal = error
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < HEADER_MEMORY
    if refusal is not None:
        assert refusal.code in ("header", "too_large")
        assert len(str(refusal)) < 5 * MAX_HEADER_BYTES  # repr writes a control character with four
    return header


# Headers.

ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.binary() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
WORDS = st.text(st.characters(codec="utf-8"), max_size=40)
WHOLE = st.integers(0, (1 << 64) - 1)
FIELDS = (WHOLE, WHOLE, WORDS, WHOLE, WORDS, WORDS, WHOLE, st.integers(0, MAX_PACKET_BYTES), st.integers(1, MAX_WEIGHT))


@quick
@given(st.tuples(*FIELDS))
def test_every_header_is_read_as_it_was_written(fields: Any) -> None:
    source, incarnation, *tag, codec, numel, nbytes, weight = fields
    header = Header(source, incarnation, Tag(*tag), codec, numel, nbytes, weight)
    assert read(pack_header(header)) == header


@quick
@given(st.binary(max_size=2 * MAX_HEADER_BYTES))
def test_any_bytes_are_no_header(data: bytes) -> None:
    header = read(data)
    assert header is None or pack_header(header) == data


@quick
@given(st.lists(ANY, max_size=12), st.integers(0, 8), st.tuples(*FIELDS), ANY)
def test_what_is_spelled_like_a_header_is_one_or_refused(
    fields: list[Any], place: int, good: tuple[Any, ...], wrong: Any
) -> None:
    for tried in (fields, [*good[:place], wrong, *good[place + 1 :]]):
        data = msgpack.packb(tried)
        header = read(data)
        if header is not None:
            assert pack_header(header) == data
            assert 0 <= header.nbytes <= MAX_PACKET_BYTES
            assert 1 <= header.weight <= MAX_WEIGHT


@quick
@given(
    st.sampled_from([b"\xdc", b"\xdd", b"\xde", b"\xdf", b"\xc4", b"\xc5", b"\xc6", b"\xc9", b"\xd9", b"\xdb"]), WHOLE
)
def test_a_length_that_a_header_declares_takes_no_memory(kind: bytes, length: int) -> None:
    assert read(kind + struct.pack(">Q", length)) is None
    assert read(b"\x99" + kind + b"\xff" * 8) is None
    assert read((b"\x91" * MAX_HEADER_BYTES)[: length % MAX_HEADER_BYTES]) is None


# Frames, up to the decoded vector.

HONEST = {name: [data for data in frames.honest() if frames.NAMES[data[0]] == name] for name in frames.NAMES}
EDITS = st.lists(
    st.tuples(st.integers(0, 1 << 13), st.binary(min_size=1, max_size=1) | st.sampled_from(frames.WORDS)), max_size=4
)


def edited(data: bytes, edits: list[tuple[int, bytes]]) -> bytes:
    """Return the data with some of its bytes replaced; its length stays."""
    for place, piece in edits:
        place %= len(data)
        data = (data[:place] + piece + data[place + len(piece) :])[: len(data)]
    return data


def cost_of(data: bytes) -> tuple[str, Cost]:
    with Cost() as cost:
        verdict = frames.judge(data)
    assert cost.largest <= DECODE_MEMORY
    assert cost.operations <= DECODE_OPERATIONS
    return verdict, cost


@pytest.mark.parametrize("name", frames.NAMES)
def test_honest_frames_are_accepted(name: str) -> None:
    assert [cost_of(data)[0] for data in HONEST[name]] == [frames.ACCEPTED] * len(HONEST[name])


def parts_of(data: bytes) -> tuple[bytes, bytes]:
    (length,) = struct.unpack_from("<H", data, 1)
    return data[3 : 3 + length], data[3 + length :]


@pytest.mark.parametrize("name", frames.NAMES)
def test_spoiled_payloads_are_read_or_refused(name: str) -> None:
    @few
    @given(st.integers(0, len(HONEST[name]) - 1), EDITS)
    def check(which: int, edits: list[tuple[int, bytes]]) -> None:
        header, payload = parts_of(HONEST[name][which])
        verdict, _ = cost_of(frames.frame(name, header, edited(payload, edits) if payload else payload))
        assert verdict in (frames.ACCEPTED, "scale", "index", "not_finite", "codec")

    check()


@pytest.mark.parametrize("name", frames.NAMES)
def test_arbitrary_payloads_are_read_or_refused(name: str) -> None:
    header, payload = parts_of(HONEST[name][-1])

    @few
    @given(st.integers(0, (1 << 32) - 1), st.integers(0, len(payload)))
    def check(seed: int, kept: int) -> None:
        noise = random.Random(seed).randbytes(len(payload) - kept)
        verdict, _ = cost_of(frames.frame(name, header, payload[:kept] + noise))
        assert verdict in (frames.ACCEPTED, "scale", "index", "not_finite", "codec")

    check()


@quick
@given(st.sampled_from(frames.NAMES), st.sampled_from(frames.NAMES), st.data())
def test_a_frame_for_another_receiver_is_refused(name: str, other: str, data: st.DataObject) -> None:
    frame = data.draw(st.sampled_from(HONEST[name]))
    verdict = frames.judge(frames.frame(other, *parts_of(frame)))
    ours, theirs = (frames.unpack_header(parts_of(HONEST[each][0])[0]).codec for each in (name, other))
    assert verdict == (frames.ACCEPTED if ours == theirs else "codec")


CHANGES: list[tuple[str, Callable[[Header], Header], str]] = [
    ("more elements", lambda header: header._replace(numel=header.numel + 1), "length"),
    ("absurdly many elements", lambda header: header._replace(numel=1 << 62), "length"),
    ("more bytes", lambda header: header._replace(nbytes=header.nbytes + 1), "length"),
    ("more bytes than the run has", lambda header: header._replace(nbytes=1 << 36), "too_large"),
    ("more bytes than anybody has", lambda header: header._replace(nbytes=1 << 62), "too_large"),
    ("another codec", lambda header: header._replace(codec="nonesuch"), "codec"),
]


@pytest.mark.parametrize("name", sorted(set(frames.NAMES) - {SIGNAL}))
def test_a_header_that_lies_is_refused_at_the_cost_of_what_came(name: str) -> None:
    for which, change, code in CHANGES:
        header, payload = parts_of(HONEST[name][0])
        verdict, cost = cost_of(frames.frame(name, pack_header(change(unpack_header(header))), payload))
        assert (which, verdict) == (which, code)
        assert cost.largest <= max(len(payload), 4 * frames.NUMEL)


@quick
@given(st.integers(0, (1 << 32) - 1), st.sampled_from(frames.NAMES), st.sampled_from(frames.NAMES))
def test_frames_spoiled_like_those_of_the_long_run(seed: int, name: str, other: str) -> None:
    cost_of(frames.spoiled(HONEST[name][0], HONEST[other][-1], random.Random(seed)))


def test_what_is_not_finite_is_refused_by_every_codec_that_can_say_it() -> None:
    """The oracle is IEEE 754: NaN as the first float32 of a payload, where all of these have a value or a scale."""
    nan = struct.pack("<f", float("nan"))
    for name in ("float32", "int8"):
        header, payload = parts_of(HONEST[name][0])
        assert frames.judge(frames.frame(name, header, nan + payload[4:])) in ("not_finite", "scale")


def test_the_judge_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A codec that lets infinity through, and one that raises something of its own, are both found."""
    data = HONEST["float32"][0]
    monkeypatch.setitem(frames.RECEIVERS, "float32", Infinite())
    with pytest.raises(AssertionError, match="float32"):
        frames.judge(data)
    monkeypatch.setitem(frames.RECEIVERS, "float32", Infinite(size=frames.NUMEL + 1))
    with pytest.raises(AssertionError):
        frames.judge(data)


class Infinite(frames.Codec):
    """Decodes everything to infinities."""

    size: int = frames.NUMEL

    def wire_bytes(self, numel: int) -> int:
        return 0

    def pack(self, values: Tensor, payload: Tensor) -> None: ...

    def unpack(self, payload: Tensor, values: Tensor) -> None: ...

    def decode(self, packet: Any, like: Tensor) -> Tensor:
        return torch.full((self.size,), float("inf"))
