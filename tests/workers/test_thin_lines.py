"""What comes over a thin line, packet by packet, is read when a frame of it is there: a packet wakes nobody."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from decentral.workers import rpc

KEYS = rpc.Keys("the secret of this test")
PACKET_BYTES, PACKET_S = 1448, 0.0003
MESSAGE = bytes(250_000)
MESSAGES = 10

TAKER = f"""
import asyncio, resource, sys
from decentral.workers import rpc  # first, for it says how gRPC is to read
import grpc

async def take(messages, _context):
    async for _ in messages:
        pass
    return b""

async def main():
    methods = {{"Take": grpc.stream_unary_rpc_method_handler(take)}}
    keys = rpc.Keys("{KEYS.secret}")
    _, address = await rpc.serve("Thin", methods, host="127.0.0.1", port=0, keys=keys, max_message_bytes=1 << 20)
    print(address, flush=True)
    while await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
        print(resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw, flush=True)

asyncio.run(main())
"""


@contextmanager
def thin_line(to: str) -> Iterator[str]:
    """An address from which bytes go on to the other one packet by packet, and come back as they are."""
    host, _, port = to.rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as door, socket.create_connection((host, int(port))) as there:
        there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def carry() -> None:
            here, _ = door.accept()
            with here:
                back = threading.Thread(target=_copy, args=(there, here, 1 << 16, 0.0))
                back.start()
                _copy(here, there, PACKET_BYTES, PACKET_S)
                back.join()

        carrier = threading.Thread(target=carry)
        carrier.start()
        yield f"127.0.0.1:{door.getsockname()[1]}"
        carrier.join()


def _copy(source: socket.socket, to: socket.socket, nbytes: int, pause_s: float) -> None:
    while piece := source.recv(nbytes):
        to.sendall(piece)
        time.sleep(pause_s)
    to.shutdown(socket.SHUT_WR)


@pytest.mark.skipif(sys.platform != "linux", reason="SO_RCVLOWAT wakes nobody early on Linux alone")
def test_packets_of_a_frame_wake_nobody() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TAKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as taker:
        asked, said = taker.stdin, taker.stdout
        assert asked is not None
        assert said is not None

        def switches() -> int:
            print(file=asked, flush=True)
            return int(said.readline())

        async def send() -> None:
            channel = rpc.dial(address, KEYS)
            for _ in range(MESSAGES):
                await channel.unary_unary("/Thin/Take")(MESSAGE, metadata=KEYS.metadata)
            await channel.close()

        with thin_line(said.readline().strip()) as address:
            before = switches()
            asyncio.run(send())
        woken = switches() - before
        asked.close()
    assert woken < MESSAGES * len(MESSAGE) / PACKET_BYTES
