"""The data plane over real sockets: packets arrive whole, and nothing that comes in can do harm."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

from decentral.errors import PeerGone
from decentral.wire import Header, Packet, Tag, pack_header
from decentral.workers import rpc
from decentral.workers.transport import CHUNK, METHOD, SERVICE, Contact, Transport

SECRET = "0123456789abcdef"
LIMIT = 32 << 20
TAG = Tag("sync", 1, "0.0.s")


class Recorder:
    """What came in at a transport."""

    def __init__(self) -> None:
        self.packets: list[tuple[Header, Packet, int]] = []
        self.open = 0
        self.begun = 0

    def begin(self) -> None:
        self.open += 1
        self.begun += 1

    def deliver(self, header: Header, packet: Packet, nbytes: int) -> None:
        self.packets.append((header, packet, nbytes))

    def end(self) -> None:
        self.open -= 1


@asynccontextmanager
async def transport(recorder: Recorder, secret: str = SECRET, patience_s: float = 20.0) -> AsyncIterator[Any]:
    """A started transport and its address."""
    made = Transport(recorder, secret=secret, max_packet_bytes=LIMIT, patience_s=patience_s)
    address = await made.start("127.0.0.1")
    try:
        yield made, address
    finally:
        await made.close()


def run(main: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(main, 60)

    asyncio.run(bounded())
    gc.collect()  # an exception nobody looked at must show here, not in another test


def packet_of(nbytes: int) -> Packet:
    payload = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(nbytes))
    return Packet("float32", nbytes // 4, nbytes, payload)


def header_of(packet: Packet, source: int = 0, incarnation: int = 0) -> bytes:
    return pack_header(Header(source, incarnation, TAG, packet.codec, packet.numel, packet.nbytes))


async def raw(address: str, *messages: bytes, secret: str | None = SECRET) -> grpc.StatusCode:
    """Write these messages to a server, as anybody could, and return how it answered."""
    metadata = () if secret is None else rpc.credentials(secret)

    def stream() -> Iterator[bytes]:
        yield from messages

    async with rpc.dial(address) as channel:
        try:
            await channel.stream_unary(f"/{SERVICE}/{METHOD}")(stream(), metadata=metadata, timeout=20)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("nbytes", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 20_000_003])
def test_a_packet_arrives_as_it_was_sent(nbytes: int) -> None:
    async def main() -> None:
        here, there = Recorder(), Recorder()
        async with transport(here) as (sender, _), transport(there) as (receiver, address):
            sender.admit({1: Contact(0, address)})
            receiver.admit({0: Contact(0, "unused")})
            packet = packet_of(nbytes)
            header = header_of(packet)
            await sender.send(1, header, packet)
            ((got_header, got, counted),) = there.packets
            assert got_header == Header(0, 0, TAG, packet.codec, packet.numel, nbytes)
            assert (got.codec, got.numel, got.nbytes) == (packet.codec, packet.numel, packet.nbytes)
            assert got.payload is not None
            assert packet.payload is not None
            assert got.payload.equal(packet.payload)
            assert counted == len(header) + nbytes
            assert (there.begun, there.open) == (1, 0)

    run(main())


def test_many_packets_share_a_channel_and_none_is_lost() -> None:
    async def main() -> None:
        there = Recorder()
        async with transport(Recorder()) as (sender, _), transport(there) as (receiver, address):
            sender.admit({1: Contact(0, address)})
            receiver.admit({0: Contact(0, "unused")})
            packets = [packet_of(nbytes) for nbytes in range(0, 3 * CHUNK, CHUNK // 7)]
            await asyncio.gather(*[sender.send(1, header_of(packet), packet) for packet in packets])
            assert len(sender._channels) == 1
            assert sorted(packet.nbytes for _, packet, _ in there.packets) == [packet.nbytes for packet in packets]

    run(main())


def test_a_packet_that_comes_before_the_members_are_known_waits_for_them() -> None:
    async def main() -> None:
        there = Recorder()
        async with transport(Recorder()) as (sender, _), transport(there) as (receiver, address):
            sender.admit({1: Contact(0, address)})
            sending = sender.send(1, header_of(packet_of(8)), packet_of(8))
            done, _ = await asyncio.wait([sending], timeout=0.3)
            assert not done
            receiver.admit({0: Contact(0, "unused")})
            await sending
            assert len(there.packets) == 1

    run(main())


GOOD = packet_of(8)
GOOD_PAYLOAD = bytes(GOOD.payload.tolist()) if GOOD.payload is not None else b""
REFUSED = grpc.StatusCode.INVALID_ARGUMENT
BAD = {
    "no secret": ((header_of(GOOD), GOOD_PAYLOAD), None, grpc.StatusCode.UNAUTHENTICATED),
    "wrong secret": ((header_of(GOOD), GOOD_PAYLOAD), SECRET[:-1] + "0", grpc.StatusCode.UNAUTHENTICATED),
    "no header": ((), SECRET, REFUSED),
    "header is garbage": ((b"\xc1\xff\x00", GOOD_PAYLOAD), SECRET, REFUSED),
    "header of another shape": ((b"\x93\x01\x02\x03",), SECRET, REFUSED),
    "header too long": ((b"\x00" * 2000,), SECRET, REFUSED),
    "negative size": ((pack_header(Header(0, 0, TAG, "float32", 2, -8)),), SECRET, REFUSED),
    "payload too short": ((header_of(GOOD), GOOD_PAYLOAD[:-1]), SECRET, REFUSED),
    "payload missing": ((header_of(GOOD),), SECRET, REFUSED),
    "payload too long": ((header_of(GOOD), GOOD_PAYLOAD, b"x"), SECRET, REFUSED),
    "message above the chunk size": ((header_of(GOOD), bytes(3 * CHUNK)), SECRET, grpc.StatusCode.RESOURCE_EXHAUSTED),
    "stranger": ((header_of(GOOD, source=7), GOOD_PAYLOAD), SECRET, grpc.StatusCode.PERMISSION_DENIED),
    "zombie": ((header_of(GOOD, incarnation=0), GOOD_PAYLOAD), SECRET, grpc.StatusCode.PERMISSION_DENIED),
    "from the future": ((header_of(GOOD, incarnation=2), GOOD_PAYLOAD), SECRET, grpc.StatusCode.PERMISSION_DENIED),
}


def test_whatever_is_refused_leaves_no_trace_and_the_server_goes_on() -> None:
    async def main() -> None:
        there = Recorder()
        async with transport(there) as (receiver, address):
            receiver.admit({0: Contact(1, "unused")})
            for name, (messages, secret, status) in BAD.items():
                fixed = [
                    header_of(GOOD, incarnation=1) if message == header_of(GOOD) and name != "zombie" else message
                    for message in messages
                ]
                assert await raw(address, *fixed, secret=secret) == status, name
                assert (there.packets, there.open) == ([], 0), name
            assert await raw(address, header_of(GOOD, incarnation=1), GOOD_PAYLOAD) == grpc.StatusCode.OK
            assert len(there.packets) == 1

    run(main())


def test_an_absurd_size_is_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("memory was taken")

    async def main() -> None:
        async with transport(Recorder()) as (receiver, address):
            receiver.admit({0: Contact(0, "unused")})
            monkeypatch.setattr("decentral.workers.transport.torch.empty", no_memory)
            for nbytes in (LIMIT + 1, 1 << 35, 1 << 62):
                header = pack_header(Header(0, 0, TAG, "float32", 1, nbytes))
                assert await raw(address, header) == grpc.StatusCode.INVALID_ARGUMENT

    run(main())


def test_a_sender_that_falls_silent_is_given_up() -> None:
    async def main() -> None:
        there = Recorder()
        async with transport(there, patience_s=0.2) as (receiver, address), rpc.dial(address) as channel:
            receiver.admit({0: Contact(0, "unused")})
            call = channel.stream_unary(f"/{SERVICE}/{METHOD}")(metadata=rpc.credentials(SECRET))
            await call.write(header_of(GOOD))
            assert await call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            assert (there.packets, there.open) == ([], 0)

    run(main())


def test_a_receiver_that_takes_nothing_is_given_up() -> None:
    async def main() -> None:
        async with transport(Recorder(), patience_s=0.2) as (sender, _), transport(Recorder()) as (_, address):
            sender.admit({1: Contact(0, address)})  # nobody has told the other one who is in the run
            with pytest.raises(PeerGone, match="took nothing for"):
                await sender.send(1, header_of(GOOD), packet_of(20_000_000))

    run(main())


def test_the_dead_the_unknown_and_the_unwilling_are_gone() -> None:
    async def main() -> None:
        there = Recorder()
        async with transport(Recorder()) as (sender, _), transport(there) as (receiver, address):
            receiver.admit({0: Contact(1, "unused")})
            sender.admit({1: Contact(0, address), 2: Contact(0, "127.0.0.1:1")})
            with pytest.raises(PeerGone, match="worker 2 cannot be reached"):
                await sender.send(2, header_of(GOOD), GOOD)
            with pytest.raises(PeerGone, match="worker 3 is not in the run"):
                await sender.send(3, header_of(GOOD), GOOD)
            with pytest.raises(PeerGone, match="incarnation 0 of worker 0 has been replaced by 1"):
                await sender.send(1, header_of(GOOD), GOOD)
            sender.send(2, header_of(GOOD), GOOD)  # nobody looks at it, and nobody complains
            await sender.drained()

    run(main())


def test_a_member_that_dies_ends_what_is_on_the_way_to_it() -> None:
    async def main() -> None:
        async with transport(Recorder()) as (sender, _):
            async with transport(Recorder()) as (_, address):
                sender.admit({1: Contact(0, address)})
                killed = sender.send(1, header_of(packet_of(20_000_000)), packet_of(20_000_000))
                await asyncio.wait([killed], timeout=0.2)  # it waits to be admitted, for ever
            with pytest.raises(PeerGone):
                await killed

    run(main())


def test_a_member_that_left_ends_what_is_on_the_way_to_it() -> None:
    async def main() -> None:
        async with transport(Recorder()) as (sender, _), transport(Recorder()) as (_, address):
            sender.admit({1: Contact(0, address)})
            dropped = sender.send(1, header_of(GOOD), GOOD)
            await asyncio.wait([dropped], timeout=0.1)
            sender.admit({})
            with pytest.raises(PeerGone, match="worker 1 left the run"):
                await dropped

    run(main())
