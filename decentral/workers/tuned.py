"""gRPC as it is here: whoever needs `grpc` takes it from this module, so that nobody imports it before."""

from __future__ import annotations

import os

__all__ = ["grpc"]

EXPERIMENTS = "tcp_frame_size_tuning,tcp_rcv_lowat"
"""gRPC's names for reading a socket when a frame is there, not whenever a packet has come. On a line so thin that
packets come one by one, receiving 250 kB takes 3 ms of the processor and 90 wake-ups so, and else 9 ms and 510."""
_WISHES = {
    "GRPC_EXPERIMENTS": EXPERIMENTS,
    "GRPC_VERBOSITY": "ERROR",  # else there is a line on the terminal ("Got goaway") when a server stops
}

# gRPC reads the variables once, when it is imported; whoever has set one has the last word. They do not stay set: Ray's
# processes, which inherit the driver's environment, have a gRPC of their own.
_ours = _WISHES.keys() - os.environ.keys()
os.environ.update({name: _WISHES[name] for name in _ours})
import grpc  # noqa: E402
import grpc.aio  # noqa: E402

for _name in _ours:
    del os.environ[_name]
