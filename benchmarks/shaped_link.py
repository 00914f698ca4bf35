"""The mean of 100 MB of float32 between two processes over an emulated link of 100 Mbit/s, by codec.

    python -m benchmarks.shaped_link

Real bytes over real sockets; the transport holds them up as the link would (`real.shape_links`). All codecs take turns.
Printed are median seconds of a mean, beside what the bits on the wire alone would take, and how much quicker than
float32 that is.
"""

from __future__ import annotations

import asyncio
import functools
import statistics
import time
from multiprocessing.connection import Connection

import torch

from benchmarks.all_reduce import Node, start
from decentral.protocols import CODECS
from decentral.workers.pace import Pace

NUMEL = 25_000_000
LINK_BPS = 100e6
TURNS = 3
NAMES = ("float32", "bf16", "int8", "int4", "e3m0")


def shaped(name: str, rank: int, peers: int, pipe: Connection) -> None:
    """Take part in a mean by this codec whenever the pipe says so."""
    asyncio.run(_shaped(name, rank, peers, pipe))


async def _shaped(name: str, rank: int, peers: int, pipe: Connection) -> None:
    node = await Node.join(rank, peers, pipe, NUMEL, Pace(up_bps=LINK_BPS, down_bps=LINK_BPS))
    values = torch.randn(NUMEL, generator=torch.Generator().manual_seed(rank))
    word = "go"
    while word != "last":
        word = await node.word()
        began = time.monotonic()
        await node.mean(values, CODECS[name]())
        pipe.send((began, time.monotonic()))
    await node.leave()


def main() -> None:
    contenders = {name: start(functools.partial(shaped, name), 2) for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for left in reversed(range(TURNS)):
        for name, turn in contenders.items():
            seconds[name].append(turn(left == 0))
    print(f"2 peers, {4 * NUMEL / 1e6:.0f} MB, {LINK_BPS / 1e6:.0f} Mbit/s")
    usual = statistics.median(seconds["float32"])
    for name, times in seconds.items():
        median = statistics.median(times)
        wire_s = 8 * CODECS[name]().wire_bytes(NUMEL) / LINK_BPS  # half the vector to the other owner, and half back
        spread = f"({min(times):.3f} to {max(times):.3f})"
        print(f"  {name:8} {median:6.3f} s  {spread}  wire alone {wire_s:6.3f} s  {usual / median:5.2f} x float32")


if __name__ == "__main__":
    main()
