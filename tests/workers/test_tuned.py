"""gRPC as everybody here has it."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from decentral.workers.tuned import grpc

CALLER = """
import os, sys
from decentral.workers.tuned import grpc

try:
    grpc.insecure_channel(sys.argv[1]).unary_unary("/a/b")(b"")
except grpc.RpcError:
    print("over", {"GRPC_VERBOSITY", "GRPC_EXPERIMENTS"} & os.environ.keys())
"""


class Waiting(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Takes one call, and does not answer it."""

    def __init__(self) -> None:
        self.called, self.over = threading.Event(), threading.Event()

    def service(self, _details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._wait)

    def _wait(self, _request: bytes, _context: Any) -> bytes:
        self.called.set()
        self.over.wait()
        return b""


def test_a_server_that_stops_puts_nothing_on_a_callers_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    monkeypatch.delenv("GRPC_EXPERIMENTS", raising=False)
    waiting = Waiting()
    server = grpc.server(ThreadPoolExecutor(1), handlers=[waiting])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    command = [sys.executable, "-c", CALLER, f"127.0.0.1:{port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as caller:
        try:
            assert waiting.called.wait(60.0)
            server.stop(None)
            out, err = caller.communicate(timeout=60.0)
        finally:
            waiting.over.set()
            caller.kill()  # nothing, if it has ended
    assert (out, err) == ("over set()\n", "")
