"""The data plane: packets go from worker to worker, each in a gRPC stream of its own.

A stream is one header (`wire.pack_header`) and then the payload in chunks of at most `CHUNK` bytes. The receiver trusts
nothing: secret, header, declared size and source are checked before memory is taken, and the size again at the end.
Packets are matched by tag, so their order does not matter and none waits for another.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, Protocol

import grpc
import grpc.aio
import torch
from torch import Tensor

from decentral.errors import PeerGone
from decentral.wire import FrameError, Header, Packet, unpack_header
from decentral.workers import rpc

CHUNK = 1 << 20
"""Bytes of payload in a message."""

SERVICE = "decentral.Packets"
METHOD = "Send"
_PATH = f"/{SERVICE}/{METHOD}"


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


class Transport:
    """One worker's server and its channels to the others.

    `max_packet_bytes` bounds what a header may declare. `patience_s` bounds every wait for the other side's next move:
    a peer that is silent for so long in mid-packet is taken for gone.
    """

    def __init__(self, receiver: Receiver, *, keys: rpc.Keys, max_packet_bytes: int, patience_s: float) -> None:
        self._receiver = receiver
        self._keys = keys
        self._max_packet_bytes = max_packet_bytes
        self._patience_s = patience_s
        self._contacts: dict[int, Contact] = {}
        self._admitted = asyncio.Event()
        self._channels: dict[str, Any] = {}
        self._flights: dict[int, set[asyncio.Task[None]]] = {}
        self._server: Any = None

    async def start(self, host: str) -> str:
        """Listen on a free port of `host`; return the address. Raises `RunError`."""
        handler = grpc.stream_unary_rpc_method_handler(self._receive)
        self._server, address = await rpc.serve(
            SERVICE, {METHOD: handler}, host=host, port=0, keys=self._keys, max_message_bytes=2 * CHUNK
        )
        return address

    def admit(self, contacts: Mapping[int, Contact]) -> None:
        """From now on talk to these members, and hear these incarnations of them and no others."""
        for worker in set(self._contacts) - set(contacts):
            self.drop(worker)
        self._contacts = dict(contacts)
        self._admitted.set()

    def drop(self, worker: int) -> None:
        """The worker is gone: packets on the way to it fail with `PeerGone`, packets from it are refused."""
        self._contacts.pop(worker, None)
        for flight in list(self._flights.get(worker, ())):
            flight.cancel()

    def send(self, to: int, header: bytes, packet: Packet) -> asyncio.Future[None]:
        """Start sending; the future is done when the packet has been delivered, or fails with `PeerGone`."""
        arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        arrived.add_done_callback(_seen)
        flight = asyncio.get_running_loop().create_task(self._fly(to, header, packet))
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

    async def drained(self) -> None:
        """Wait until nothing of ours is on the way any more. Takes as long as the patience at most, per packet."""
        while flights := [flight for flights in self._flights.values() for flight in flights]:
            await asyncio.wait(flights)

    async def close(self) -> None:
        """Hang up and stop listening. Packets on the way fail."""
        for worker in list(self._flights):
            self.drop(worker)
        await self.drained()
        for channel in self._channels.values():
            await channel.close()
        if self._server is not None:
            await self._server.stop(grace=None)

    # -- sending ---------------------------------------------------------------------------------------------------

    async def _fly(self, to: int, header: bytes, packet: Packet) -> None:
        contact = self._contacts.get(to)
        if contact is None:
            raise PeerGone(f"worker {to} is not in the run")
        call = self._method(contact.address)(metadata=self._keys.metadata)
        try:
            await self._soon(call.write(header))
            for chunk in _chunks(packet.payload):
                await self._soon(call.write(chunk))
            await self._soon(call.done_writing())
            await self._soon(call)
        except asyncio.TimeoutError:
            raise PeerGone(f"worker {to} took nothing for {self._patience_s:g} s") from None
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise PeerGone(f"worker {to} cannot be reached: {await call.details()}") from None
        finally:
            call.cancel()

    def _method(self, address: str) -> Any:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = rpc.dial(address, self._keys)
        return channel.stream_unary(_PATH)

    async def _soon(self, step: Any) -> Any:
        return await asyncio.wait_for(step, self._patience_s)

    # -- receiving -------------------------------------------------------------------------------------------------

    async def _receive(self, messages: AsyncIterator[bytes], context: Any) -> bytes:
        try:
            await self._take(messages)
        except FrameError as error:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except PeerGone as error:
            await _refuse(context, grpc.StatusCode.PERMISSION_DENIED, str(error))
        except asyncio.TimeoutError:
            await _refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED, f"nothing came for {self._patience_s:g} s")
        return b""

    async def _take(self, messages: AsyncIterator[bytes]) -> None:
        data = await self._next(messages)
        if data is None:
            raise FrameError("header", "the stream ended before a header came")
        header = unpack_header(data)
        if header.nbytes > self._max_packet_bytes:
            raise FrameError(
                "too_large", f"a packet of {header.nbytes} bytes; this run has none above {self._max_packet_bytes}"
            )
        await self._soon(self._admitted.wait())  # a quicker member may write before we know who is in the run
        self._check_source(header)
        self._receiver.begin()
        try:
            payload = await self._fill(header.nbytes, messages)
            self._check_source(header)  # it may have been replaced while it wrote
            packet = Packet(header.codec, header.numel, header.nbytes, payload, header.weight)
            self._receiver.deliver(header, packet, len(data) + header.nbytes)
        finally:
            self._receiver.end()

    async def _fill(self, nbytes: int, messages: AsyncIterator[bytes]) -> Tensor:
        payload = torch.empty(nbytes, dtype=torch.uint8)
        view = _bytes(payload)
        place = 0
        while (chunk := await self._next(messages)) is not None:
            if place + len(chunk) > nbytes:
                raise FrameError("length", f"the payload is longer than the {nbytes} bytes its header declares")
            view[place : place + len(chunk)] = chunk
            place += len(chunk)
        if place < nbytes:
            raise FrameError("length", f"the payload ended after {place} of the {nbytes} bytes its header declares")
        return payload

    async def _next(self, messages: AsyncIterator[bytes]) -> bytes | None:
        try:
            message: bytes = await self._soon(messages.__anext__())
        except StopAsyncIteration:
            return None
        return message

    def _check_source(self, header: Header) -> None:
        contact = self._contacts.get(header.source)
        if contact is None:
            raise PeerGone(f"worker {header.source} is not in the run")
        if contact.incarnation != header.incarnation:
            raise PeerGone(
                f"incarnation {header.incarnation} of worker {header.source} has been replaced by {contact.incarnation}"
            )


def _chunks(payload: Tensor | None) -> Iterator[bytes]:
    if payload is None:
        return
    view = _bytes(payload)
    for start in range(0, len(view), CHUNK):
        yield bytes(view[start : start + CHUNK])


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
