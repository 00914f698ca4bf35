"""The data plane over real sockets: packets arrive whole, and nothing that comes in can do harm."""

from __future__ import annotations

import asyncio
import gc
import resource
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

from decentral.errors import PeerGone
from decentral.sim.clock import VirtualLoop
from decentral.wire import FrameError, Header, Packet, Tag, pack_header
from decentral.workers import rpc
from decentral.workers.pace import Pace
from decentral.workers.transport import CHUNK, METHOD, SERVICE, Contact, Patience, Transport, call_worker, opening

SECRET = "0123456789abcdef"
KEYS = rpc.Keys(SECRET)
LIMIT = 32 << 20
TAG = Tag("sync", 1, "0.0.s")


class Recorder:
    """What came in at a transport."""

    def __init__(self) -> None:
        self.packets: list[tuple[Header, Packet, int]] = []
        self.open = 0
        self.begun = 0
        self.refused: list[tuple[int, str]] = []

    def begin(self) -> None:
        self.open += 1
        self.begun += 1

    def deliver(self, header: Header, packet: Packet, nbytes: int) -> None:
        self.packets.append((header, packet, nbytes))

    def end(self) -> None:
        self.open -= 1

    def refuse(self, source: int, error: FrameError) -> None:
        self.refused.append((source, error.code))


@asynccontextmanager
async def transport(recorder: Recorder, patience_s: float = 20.0, pace: Pace | None = None) -> AsyncIterator[Any]:
    """A started transport and its address."""
    made = Transport(recorder, keys=KEYS, max_packet_bytes=LIMIT, patience_s=patience_s, pace=pace)
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
    metadata = () if secret is None else rpc.Keys(secret).metadata

    def stream() -> Iterator[bytes]:
        yield from messages

    async with rpc.dial(address, KEYS) as channel:
        try:
            await channel.stream_unary(f"/{SERVICE}/{METHOD}")(stream(), metadata=metadata, timeout=20)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_who_comes_back_again_and_again_leaves_no_channel_behind() -> None:
    async def main() -> None:
        channels: list[int] = []
        async with transport(Recorder()) as (sender, _):
            for incarnation in range(12):
                async with transport(Recorder()) as (receiver, address):
                    sender.admit({1: Contact(incarnation, address)})
                    receiver.admit({0: Contact(0, "unused")})
                    packet = packet_of(100)
                    await sender.send(1, header_of(packet), packet)
                gc.collect()
                channels.append(sum(issubclass(type(thing), grpc.aio.Channel) for thing in gc.get_objects()))
        assert channels[-1] <= channels[3]

    run(main())


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


def good_call(source: int = 0, incarnation: int = 1) -> tuple[bytes, ...]:
    return opening(header_of(GOOD, source, incarnation)), GOOD_PAYLOAD


GOOD_CALL = good_call()
GOOD_OPENING = GOOD_CALL[0]
BAD = {
    "no secret": (GOOD_CALL, None, grpc.StatusCode.UNAUTHENTICATED),
    "wrong secret": (GOOD_CALL, SECRET[:-1] + "0", grpc.StatusCode.UNAUTHENTICATED),
    "no header": ((), SECRET, REFUSED),
    "header is garbage": ((opening(b"\xc1\xff\x00"), GOOD_PAYLOAD), SECRET, REFUSED),
    "header of another shape": ((opening(b"\x93\x01\x02\x03"),), SECRET, REFUSED),
    "header too long": ((opening(b"\x00" * 2000),), SECRET, REFUSED),
    "header cut off": ((GOOD_OPENING[:-1],), SECRET, REFUSED),
    "no room for a length": ((b"\x00",), SECRET, REFUSED),
    "negative size": ((opening(pack_header(Header(0, 1, TAG, "float32", 2, -8))),), SECRET, REFUSED),
    "payload too short": ((GOOD_OPENING, GOOD_PAYLOAD[:-1]), SECRET, REFUSED),
    "payload missing": ((GOOD_OPENING,), SECRET, REFUSED),
    "payload too long": ((GOOD_OPENING, GOOD_PAYLOAD, b"x"), SECRET, REFUSED),
    "first message too long": ((GOOD_OPENING + GOOD_PAYLOAD + b"x",), SECRET, REFUSED),
    "message above the chunk size": ((GOOD_OPENING, bytes(3 * CHUNK)), SECRET, grpc.StatusCode.RESOURCE_EXHAUSTED),
    "stranger": (good_call(source=7), SECRET, grpc.StatusCode.PERMISSION_DENIED),
    "zombie": (good_call(incarnation=0), SECRET, grpc.StatusCode.PERMISSION_DENIED),
    "from the future": (good_call(incarnation=2), SECRET, grpc.StatusCode.PERMISSION_DENIED),
}


def test_whatever_is_refused_leaves_no_trace_and_the_server_goes_on() -> None:
    async def main() -> None:
        there = Recorder()
        async with transport(there) as (receiver, address):
            receiver.admit({0: Contact(1, "unused")})
            for name, (messages, secret, status) in BAD.items():
                assert await raw(address, *messages, secret=secret) == status, name
                assert (there.packets, there.open) == ([], 0), name
            assert there.refused == [(0, "length")] * 5  # what a member sent is counted; strangers are not members
            assert await raw(address, *GOOD_CALL) == grpc.StatusCode.OK
            assert len(there.packets) == 1

    run(main())


def test_an_absurd_size_is_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("memory was taken")

    async def main() -> None:
        async with transport(Recorder()) as (receiver, address):
            receiver.admit({0: Contact(0, "unused")})
            monkeypatch.setattr("decentral.workers.transport.Buffers.lend", no_memory)
            for nbytes in (LIMIT + 1, 1 << 35, 1 << 62):
                header = pack_header(Header(0, 0, TAG, "float32", 1, nbytes))
                assert await raw(address, opening(header)) == grpc.StatusCode.INVALID_ARGUMENT

    run(main())


def test_a_sender_that_falls_silent_is_given_up() -> None:
    async def main() -> None:
        there = Recorder()
        async with transport(there, patience_s=0.2) as (receiver, address), rpc.dial(address, KEYS) as channel:
            receiver.admit({0: Contact(0, "unused")})
            call = channel.stream_unary(f"/{SERVICE}/{METHOD}")(metadata=KEYS.metadata)
            await call.write(opening(header_of(GOOD)))
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


@pytest.mark.parametrize(("lets_go", "sign"), [(True, "gone"), (False, "silent")])
def test_who_hangs_up_on_a_call_is_gone_if_its_port_is_free_then(lets_go: bool, sign: str) -> None:
    """As a process does that is being killed: its port outlives its threads for a moment."""

    async def main() -> None:
        calls: list[asyncio.StreamWriter] = []

        def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            calls.append(writer)
            if len(calls) > 1:
                if lets_go:
                    server.close()
                writer.transport.abort()

        server = await asyncio.start_server(hang_up, "127.0.0.1")
        host, port = server.sockets[0].getsockname()
        assert await call_worker(f"{host}:{port}", KEYS) == sign
        server.close()

    run(main())


def test_a_member_that_dies_or_leaves_ends_what_is_on_the_way_to_it() -> None:
    async def main() -> None:
        async with transport(Recorder()) as (sender, _), transport(Recorder()) as (_, remote):
            async with transport(Recorder()) as (_, mortal):
                sender.admit({1: Contact(0, mortal), 2: Contact(0, remote)})
                packet = packet_of(20_000_000)
                killed, dropped = sender.send(1, header_of(packet), packet), sender.send(2, header_of(GOOD), GOOD)
                done, _ = await asyncio.wait([killed, dropped], timeout=0.2)  # they wait to be admitted, for ever
                assert not done
            with pytest.raises(PeerGone):
                await killed
            assert not dropped.done()
            sender.admit({})
            with pytest.raises(PeerGone, match="worker 2 left the run"):
                await dropped

    run(main())


def test_a_shaped_link_takes_the_time_that_its_size_rate_and_latency_come_to() -> None:
    """The slower of the sender's uplink and the receiver's downlink decides, for real bytes on a real socket."""
    latency_s, nbytes, bps = 0.05, 2_000_000, 80e6

    async def main(up: Pace, down: Pace) -> None:
        async with transport(Recorder(), pace=up) as (sender, _), transport(Recorder(), pace=down) as (receiver, there):
            sender.admit({1: Contact(0, there)})
            receiver.admit({0: Contact(0, "unused")})
            await sender.send(1, header_of(GOOD), GOOD)  # connects
            packet = packet_of(nbytes)
            seconds: list[float] = []
            for _ in range(3):  # a busy machine makes a transfer longer, never shorter
                began = time.perf_counter()
                await sender.send(1, header_of(packet), packet)
                seconds.append(time.perf_counter() - began)
            expected = latency_s + 8 * nbytes / bps
            assert 0.95 * expected <= min(seconds) <= 1.3 * expected

    run(main(Pace(up_bps=bps, latency_s=latency_s), Pace(down_bps=4 * bps)))
    run(main(Pace(up_bps=4 * bps, latency_s=latency_s), Pace(down_bps=bps)))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_receiver_that_does_not_read_costs_the_sender_no_memory() -> None:
    async def main() -> None:
        async def read_nothing(_messages: AsyncIterator[bytes], _context: Any) -> bytes:
            await asyncio.Event().wait()
            return b""

        server = grpc.aio.server(options=(("grpc.http2.bdp_probe", 0),))  # reads 64 KiB ahead, in this same process
        handlers = {METHOD: grpc.stream_unary_rpc_method_handler(read_nothing)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with transport(Recorder()) as (sender, _):
            sender.admit({1: Contact(0, f"127.0.0.1:{port}")})
            packet = packet_of(LIMIT)
            before = resident_bytes()
            sending = [sender.send(1, header_of(packet), packet) for _ in range(6)]
            done, _ = await asyncio.wait(sending, timeout=0.5)
            assert not done
            assert resident_bytes() - before < LIMIT  # where 6 * LIMIT want to be sent
        await server.stop(grace=None)

    run(main())


def test_one_worker_can_have_no_more_coming_than_the_largest_packet() -> None:
    async def main() -> None:
        there = Recorder()
        async with transport(there) as (receiver, address), rpc.dial(address, KEYS) as channel:
            receiver.admit({0: Contact(0, "unused"), 1: Contact(0, "unused")})
            large = packet_of(LIMIT)
            calls = [channel.stream_unary(f"/{SERVICE}/{METHOD}")(metadata=KEYS.metadata) for _ in range(5)]
            for call in calls:
                await call.write(opening(header_of(large)))
            assert await raw(address, *good_call(source=1, incarnation=0)) == grpc.StatusCode.OK
            while there.begun < 2:
                await asyncio.sleep(0)
            assert await raw(address, *good_call(source=1, incarnation=0)) == grpc.StatusCode.OK
            assert there.begun == 3  # one of the large ones has a place, the others wait for it
            for call in calls:
                call.cancel()
            assert await raw(address, *good_call(incarnation=0)) == grpc.StatusCode.OK

    run(main())


def test_the_event_loop_stays_responsive_while_much_comes_in() -> None:
    async def main() -> None:
        there = Recorder()
        async with transport(Recorder()) as (sender, _), transport(there) as (receiver, address):
            sender.admit({1: Contact(0, address)})
            receiver.admit({0: Contact(0, "unused")})
            packet = packet_of(LIMIT)
            sending = asyncio.gather(*[sender.send(1, header_of(packet), packet) for _ in range(3)])
            turns = 0
            while not sending.done():
                await asyncio.sleep(0)
                turns += 1
            assert turns > 3 * LIMIT // CHUNK  # others had their turn between chunks, many times

    run(main())


def test_nothing_is_left_after_close() -> None:
    async def main() -> None:
        before = asyncio.all_tasks()
        async with transport(Recorder()) as (sender, _), transport(Recorder()) as (receiver, address):
            sender.admit({1: Contact(0, address)})
            receiver.admit({0: Contact(0, "unused")})
            for nbytes in (8, 5_000_000):
                packet = packet_of(nbytes)
                await sender.send(1, header_of(packet), packet)
            sender.send(1, header_of(packet), packet)  # still on its way at the end
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before

    threads = threading.active_count()
    run(main())
    assert threading.active_count() <= threads + 1  # grpc.aio's poller, one for the process


def test_a_transport_that_is_closed_has_hung_up_on_whom_it_only_heard() -> None:
    async def main() -> None:
        async with transport(Recorder()) as (_, address):
            async with transport(Recorder()) as (sender, _):
                sender.admit({1: Contact(0, address)})
                await sender.beat(1, 10)
            gc.collect()
            open_channels = [thing for thing in gc.get_objects() if issubclass(type(thing), grpc.aio.Channel)]
            assert not open_channels

    run(main())


def test_patience_runs_out_only_when_nothing_is_renewed() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with Patience(1.0) as patience:
            for _ in range(5):
                await asyncio.sleep(0.9)
                patience.renew()
        assert loop.time() == pytest.approx(4.5)
        with pytest.raises(asyncio.TimeoutError), Patience(1.0):
            await asyncio.Event().wait()
        assert loop.time() == pytest.approx(5.5)
        task = asyncio.current_task()
        assert task is not None
        loop.call_later(0.5, task.cancel)
        with pytest.raises(asyncio.CancelledError), Patience(1.0):  # somebody else's wish
            await asyncio.Event().wait()

    loop = VirtualLoop()
    loop.run_until_complete(main())
    loop.close()
