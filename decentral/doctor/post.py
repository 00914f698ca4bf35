"""What a node serves to other nodes' doctors: what is seen there, its clock, and somebody to send packets to."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgpack

from decentral import profile
from decentral.config import Run
from decentral.doctor.checks import look
from decentral.workers import rpc
from decentral.workers.tuned import grpc

SERVICE = "decentral.Doctor"
LOOK, CLOCK = "Look", "Clock"


class Post:
    """Answers whoever has the keys. What it is asked never says what to do here: all is as in its own run file."""

    def __init__(self, run: Run, keys: rpc.Keys) -> None:
        self._run, self._keys = run, keys
        self._listener = profile.listener(keys, run.patience_s)
        self._packets = ""
        self._server: Any = None

    async def start(self, host: str, port: int = 0) -> str:
        """Listen on that port of `host` (0: a free one); return the address. Raises `RunError`.

        Packets go to a port of their own, any free one, as those of workers do.
        """
        self._packets = await self._listener.start(host)
        methods = {LOOK: grpc.unary_unary_rpc_method_handler(self._look)}
        methods[CLOCK] = grpc.unary_unary_rpc_method_handler(_clock)
        self._server, address = await rpc.serve(
            SERVICE, methods, host=host, port=port, keys=self._keys, max_message_bytes=1 << 10
        )
        return address

    async def close(self) -> None:
        """Stop listening."""
        await self._listener.close()
        if self._server is not None:
            await self._server.stop(grace=None)

    async def _look(self, _request: bytes, _context: Any) -> bytes:
        seen = await asyncio.get_running_loop().run_in_executor(None, look, self._run)
        answer: bytes = msgpack.packb({"seen": seen, "packets": self._packets})
        return answer


async def _clock(_request: bytes, _context: Any) -> bytes:
    answer: bytes = msgpack.packb(time.time())
    return answer
