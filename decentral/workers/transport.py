"""The data plane: packets go from worker to worker, each in a gRPC call of its own.

A call's first message is the header (`wire.pack_header`, behind its length in two bytes, big-endian) and the payload's
first bytes; what is left of the payload follows in chunks of at most `CHUNK` bytes. A small packet is one message, so
that it costs what the cheapest call costs. gRPC's flow control holds up the sender of whoever does not read: at any
time a packet on its way has a few chunks of memory beside its payload.

The receiver trusts nothing: secret, header, declared size and source are checked before memory is taken, and the size
again at the end. Packets are matched by tag, so their order does not matter and none waits for another.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Literal, NamedTuple, NoReturn, Protocol

from torch import Tensor

from decentral.errors import PeerGone
from decentral.wire import FrameError, Header, Packet, unpack_header
from decentral.workers import rpc
from decentral.workers.buffers import Buffers
from decentral.workers.pace import Pace
from decentral.workers.tuned import grpc

CHUNK = 1 << 20
"""Bytes of payload in a message."""
KEPT_BYTES = 1 << 26
"""Memory for packets that is kept between rounds: what a few segments of a collective take."""

SERVICE = "decentral.Packets"
METHOD = "Send"
BEAT = "Beat"
_SEND = f"/{SERVICE}/{METHOD}"
_BEAT = f"/{SERVICE}/{BEAT}"
CALL_S = 2.0
"""Seconds that a worker has to answer whoever doubts that it lives."""

Sign = Literal["alive", "gone", "silent"]
"""What a call to a worker came to: it answered, nothing listens there any more, or neither in time."""


class Contact(NamedTuple):
    """Where a member's current incarnation listens."""

    incarnation: int
    address: str


class Receiver(Protocol):
    """Who is told what comes in, on the event loop."""

    def begin(self) -> None:
        """A header was accepted; its payload is coming."""

    def deliver(self, header: Header, packet: Packet, nbytes: int) -> None:
        """All of a frame of `nbytes` bytes is here."""

    def end(self) -> None:
        """What `begin` announced is over, delivered or not."""

    def refuse(self, source: int, error: FrameError) -> None:
        """A frame of this member was refused."""


class Lookout(Protocol):
    """Who knows more than we do about who is in the run, and wants to know what we find out."""

    async def catch_up(self) -> None:
        """Somebody writes whom we do not know: `admit` it, if it has come since."""

    def unreachable(self, worker: int, incarnation: int) -> None:
        """A member cannot be reached."""


class Transport:
    """One worker's server and its channels to the others.

    `max_packet_bytes` bounds what a header may declare, and what may be coming from one worker at a time: more than
    that waits at the sender. `patience_s` bounds every wait for the other side's next move: a peer that is silent for
    so long in mid-packet is taken for gone. `pace` holds up bytes that would be too quick.
    """

    def __init__(
        self,
        receiver: Receiver,
        *,
        keys: rpc.Keys,
        max_packet_bytes: int,
        patience_s: float,
        pace: Pace | None = None,
    ) -> None:
        self._receiver = receiver
        self._keys = keys
        self._max_packet_bytes = max_packet_bytes
        self._patience_s = patience_s
        self.pace = pace or Pace()
        self.lookout: Lookout | None = None
        self._buffers = Buffers(min(max_packet_bytes // 2, KEPT_BYTES))
        self._incoming: Counter[int] = Counter()  # bytes by source
        self._room = asyncio.Event()
        self._contacts: dict[int, Contact] = {}
        self._admitted = asyncio.Event()
        self._channels: dict[str, Any] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._flights: dict[int, set[asyncio.Task[None]]] = {}
        self._server: Any = None

    async def start(self, host: str, port: int = 0) -> str:
        """Listen on that port of `host` (0: a free one); return the address. Raises `RunError`."""
        methods = {
            METHOD: grpc.stream_unary_rpc_method_handler(self._receive),
            BEAT: grpc.unary_unary_rpc_method_handler(_answer_beat),
        }
        self._server, address = await rpc.serve(
            SERVICE, methods, host=host, port=port, keys=self._keys, max_message_bytes=2 * CHUNK
        )
        return address

    def admit(self, contacts: Mapping[int, Contact]) -> None:
        """From now on talk to these members, and hear these incarnations of them and no others."""
        for worker, contact in list(self._contacts.items()):
            if contacts.get(worker) != contact:
                self._drop(worker)
        self._contacts = dict(contacts)
        self._admitted.set()

    def _drop(self, worker: int) -> None:
        """The worker is gone: packets on the way to it fail with `PeerGone`, packets from it are refused."""
        for flight in list(self._flights.get(worker, ())):
            flight.cancel()
        contact = self._contacts.pop(worker, None)
        channel = self._channels.pop(contact.address, None) if contact else None
        if channel is not None:  # who comes back listens elsewhere, and may do so a thousand times
            closing = asyncio.get_running_loop().create_task(channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def send(self, to: int, header: bytes, packet: Packet, *, makes_way: bool = True) -> asyncio.Future[None]:
        """Start sending; the future is done when the packet has been delivered, or fails with `PeerGone`.

        `makes_way`: it is held back while we train, if anything is.
        """
        arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        arrived.add_done_callback(_seen)
        flight = asyncio.get_running_loop().create_task(self._fly(to, header, packet, makes_way))
        flights = self._flights.setdefault(to, set())
        flights.add(flight)

        def landed(flight: asyncio.Task[None]) -> None:
            flights.discard(flight)
            error = PeerGone(f"worker {to} left the run") if flight.cancelled() else flight.exception()
            if arrived.done():
                return
            if error is None:
                arrived.set_result(None)
            else:
                arrived.set_exception(error)

        flight.add_done_callback(landed)
        return arrived

    async def beat(self, to: int, timeout_s: float) -> None:
        """Hear whether the member lives. Raises `PeerGone` if it does not answer in time, or is no member."""
        contact = self._contacts.get(to)
        if contact is None:
            raise PeerGone(f"worker {to} is not in the run")
        try:
            beat = self._channel(contact.address).unary_unary(_BEAT)
            await beat(b"", metadata=self._keys.metadata, timeout=timeout_s)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self._not_reached(to, contact, error)
            raise PeerGone(f"worker {to} does not answer") from None

    async def drained(self) -> None:
        """Wait until nothing of ours is on the way any more. Takes as long as the patience at most, per packet."""
        while flights := [flight for flights in self._flights.values() for flight in flights]:
            await asyncio.wait(flights)

    async def close(self) -> None:
        """Hang up and stop listening. Packets on the way fail."""
        for worker in list(self._contacts):
            self._drop(worker)
        await self.drained()
        await asyncio.gather(*self._closing)
        if self._server is not None:
            await self._server.stop(grace=None)

    # -- sending ---------------------------------------------------------------------------------------------------

    async def _fly(self, to: int, header: bytes, packet: Packet, makes_way: bool) -> None:
        contact = self._contacts.get(to)
        if contact is None:
            raise PeerGone(f"worker {to} is not in the run")
        if self.pace.latency_s:
            await asyncio.sleep(self.pace.latency_s)
        flow = self.pace.sending(makes_way=makes_way)
        chunks = _chunks(header, packet, self.pace.chunk_bytes(CHUNK))
        message, last = next(chunks)
        channel = self._channel(contact.address)
        call: Any = None
        try:
            with Patience(self._patience_s) as patience:
                await flow.take(len(message))
                if last:
                    call = channel.unary_unary(_SEND)(message, metadata=self._keys.metadata)
                else:
                    call = channel.stream_unary(_SEND)(metadata=self._keys.metadata)
                    await call.write(message)
                    for message, _ in chunks:
                        patience.renew()
                        await flow.take(len(message))
                        await call.write(message)
                    patience.renew()
                    await call.done_writing()
                await call
        except asyncio.TimeoutError:
            raise PeerGone(f"worker {to} took nothing for {self._patience_s:g} s") from None
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self._not_reached(to, contact, error)
            raise PeerGone(f"worker {to} cannot be reached: {await call.details()}") from None
        finally:
            if call is not None:
                call.cancel()

    def _not_reached(self, to: int, contact: Contact, error: Exception) -> None:
        """Say so, unless it was refused what we sent: who refuses is there."""
        lost = not isinstance(error, grpc.aio.AioRpcError) or error.code() == grpc.StatusCode.UNAVAILABLE
        if lost and self.lookout is not None and self._contacts.get(to) == contact:
            self.lookout.unreachable(to, contact.incarnation)

    def _channel(self, address: str) -> Any:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = rpc.dial(address, self._keys)
        return channel

    # -- receiving -------------------------------------------------------------------------------------------------

    async def _receive(self, messages: AsyncIterator[bytes], context: Any) -> bytes:
        try:
            with Patience(self._patience_s) as patience:
                await self._take(messages, patience)
        except FrameError as error:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, f"{error.code}: {error}")
        except PeerGone as error:
            await _refuse(context, grpc.StatusCode.PERMISSION_DENIED, str(error))
        except asyncio.TimeoutError:
            await _refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED, f"nothing came for {self._patience_s:g} s")
        return b""

    async def _take(self, messages: AsyncIterator[bytes], patience: Patience) -> None:
        message = await _next(messages)
        if message is None:
            raise FrameError("header", "the stream ended before a header came")
        begins = 2 + int.from_bytes(message[:2], "big")
        header = unpack_header(message[2:begins])
        await self._admitted.wait()  # a quicker member may write before we know who is in the run
        contact = self._contacts.get(header.source)
        if self.lookout is not None and (contact is None or contact.incarnation < header.incarnation):
            await self.lookout.catch_up()
        self._check_source(header)
        try:
            await self._accept(header, message, messages, patience)
        except FrameError as error:
            self._receiver.refuse(header.source, error)
            raise

    async def _accept(self, header: Header, message: bytes, messages: AsyncIterator[bytes], patience: Patience) -> None:
        """Take the rest of a member's frame and hand it over."""
        if header.nbytes > self._max_packet_bytes:
            raise FrameError(
                "too_large", f"a packet of {header.nbytes} bytes; this run has none above {self._max_packet_bytes}"
            )
        while self._incoming[header.source] + header.nbytes > self._max_packet_bytes:
            self._room.clear()
            await self._room.wait()
        self._receiver.begin()
        self._incoming[header.source] += header.nbytes
        try:
            patience.renew()
            begins = 2 + int.from_bytes(message[:2], "big")
            payload = await self._fill(header.nbytes, memoryview(message)[begins:], messages, patience)
            self._check_source(header)  # it may have been replaced while it wrote
            packet = Packet(header.codec, header.numel, header.nbytes, payload, header.weight)
            self._receiver.deliver(header, packet, begins - 2 + header.nbytes)
        finally:
            self._incoming[header.source] -= header.nbytes
            self._room.set()
            self._receiver.end()

    async def _fill(self, nbytes: int, first: memoryview, messages: AsyncIterator[bytes], patience: Patience) -> Tensor:
        flow = self.pace.receiving()
        payload = self._buffers.lend(nbytes)
        view = _bytes(payload)
        place = 0
        chunk: memoryview | bytes | None = first
        while chunk is not None:
            if place + len(chunk) > nbytes:
                raise FrameError("length", f"the payload is longer than the {nbytes} bytes its header declares")
            view[place : place + len(chunk)] = chunk
            place += len(chunk)
            await flow.take(len(chunk))
            chunk = await _next(messages)
            patience.renew()
        if place < nbytes:
            raise FrameError("length", f"the payload ended after {place} of the {nbytes} bytes its header declares")
        return payload

    def _check_source(self, header: Header) -> None:
        contact = self._contacts.get(header.source)
        if contact is None:
            raise PeerGone(f"worker {header.source} is not in the run")
        if contact.incarnation != header.incarnation:
            raise PeerGone(
                f"incarnation {header.incarnation} of worker {header.source} has been replaced by {contact.incarnation}"
            )


class Patience:
    """Raises `asyncio.TimeoutError` in the block it guards once nothing has been renewed for `seconds`.

    Does what `asyncio.wait_for` around every step would, for a third of a small packet's time less.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[Any] | None = asyncio.current_task()
        self._expired = False

    def __enter__(self) -> Patience:
        self.renew()
        self._timer = self._loop.call_at(self._deadline, self._look)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._timer.cancel()
        if self._expired and kind is asyncio.CancelledError:
            assert self._task is not None
            if sys.version_info >= (3, 11):
                self._task.uncancel()
            raise asyncio.TimeoutError

    def renew(self) -> None:
        """The other side has moved: begin to wait anew."""
        self._deadline = self._loop.time() + self._seconds

    def _look(self) -> None:
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._look)
        else:
            assert self._task is not None
            self._expired = self._task.cancel()


async def call_worker(address: str, keys: rpc.Keys) -> Sign:
    """Find out whether a worker lives at the address."""
    sign = await _knock(address)
    if sign != "alive":
        return sign
    channel = rpc.dial(address, keys)
    try:
        await channel.unary_unary(_BEAT)(b"", metadata=keys.metadata, timeout=CALL_S)
    except grpc.aio.AioRpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return "gone"  # a stranger has its port
        # A process that is being killed still has a port at first: whoever hung up may be gone by now.
        return "gone" if await _knock(address) == "gone" else "silent"
    finally:
        await channel.close()
    return "alive"


async def _knock(address: str) -> Sign:
    """Find out whether anybody listens there."""
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host.strip("[]"), int(port)), CALL_S)
    except ConnectionRefusedError:
        return "gone"
    except (OSError, asyncio.TimeoutError):
        return "silent"
    writer.close()
    return "alive"


async def _answer_beat(_request: bytes, _context: Any) -> bytes:
    return b""


def opening(header: bytes, payload: bytes | memoryview = b"") -> bytes:
    """Return a call's first message: the header behind its length, and as much of the payload as is given."""
    return b"".join((len(header).to_bytes(2, "big"), header, payload))


def _chunks(header: bytes, packet: Packet, size: int) -> Iterator[tuple[bytes, bool]]:
    """Yield the messages of a packet, each with whether it is the last."""
    view = memoryview(b"") if packet.payload is None else _bytes(packet.payload)
    yield opening(header, view[:size]), len(view) <= size
    for start in range(size, len(view), size):
        yield bytes(view[start : start + size]), start + size >= len(view)


async def _next(messages: AsyncIterator[bytes]) -> bytes | None:
    try:
        return await messages.__anext__()
    except StopAsyncIteration:
        return None


def _bytes(payload: Tensor) -> memoryview:
    """Return a view of the payload's memory, as bytes."""
    data: Any = payload.numpy()
    return memoryview(data)


def _seen(future: asyncio.Future[None]) -> None:
    """Whoever did not await a send need not look at its failure."""
    if not future.cancelled():
        future.exception()


async def _refuse(context: Any, code: grpc.StatusCode, reason: str) -> NoReturn:
    await context.abort(code, reason)
    raise AssertionError("abort returned")
