"""gRPC as it reads sockets here: whoever needs `grpc` takes it from this module, so that nobody imports it before."""

from __future__ import annotations

import os

__all__ = ["grpc"]

EXPERIMENTS = "tcp_frame_size_tuning,tcp_rcv_lowat"
"""gRPC's names for reading a socket when a frame is there, not whenever a packet has come. On a line so thin that
packets come one by one, receiving 250 kB takes 3 ms of the processor and 90 wake-ups so, and else 9 ms and 510."""
_NAME = "GRPC_EXPERIMENTS"

# gRPC reads the variable once, when it is imported; whoever has set it has the last word. It does not stay set: Ray's
# processes, which inherit the driver's environment, have a gRPC of their own.
_is_ours = _NAME not in os.environ
os.environ.setdefault(_NAME, EXPERIMENTS)
import grpc  # noqa: E402
import grpc.aio  # noqa: E402

if _is_ours:
    del os.environ[_NAME]
