"""The mean of 100 MB of float32 among processes on one machine: ours, gloo's and hivemind's, in turn.

    python -m benchmarks.all_reduce [PEERS ...]

For each number of peers (2 and 4 if none is given) every contender starts its processes once; then all take turns, one
mean each, several times. Ours is `butterfly_mean` over the transport of a real run, gloo's is `torch.distributed`,
hivemind's is its `DecentralizedAverager`, if `python -m benchmarks.peers hivemind` has made its environment. A turn
lasts from the first process that begins to the last that ends. Printed are medians over the turns after the first two,
which warm up, and median ratios of turns.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed

from benchmarks.peers import python_of
from decentral.members import Members
from decentral.peer import Peer
from decentral.protocols.codecs import Codec, Float32
from decentral.protocols.collectives import Attempt, butterfly_mean
from decentral.replica import Replica
from decentral.workers.buffers import prepare_memory
from decentral.workers.coordinator_rpc import CoordinatorClient
from decentral.workers.pace import Pace
from decentral.workers.rpc import Keys
from decentral.workers.transport import Contact, Transport
from decentral.workers.world import Inbox, RealWorld

NUMEL = 25_000_000
TURNS, WARM = 11, 2
KEYS = Keys("the secret of this benchmark")
HIVEMIND_PEER = Path(__file__).parent / "peer" / "hivemind_all_reduce.py"


def ours(rank: int, peers: int, pipe: Connection) -> None:
    """Take part in a mean whenever the pipe says so."""
    prepare_memory()  # as a worker does
    asyncio.run(_ours(rank, peers, pipe))


async def _ours(rank: int, peers: int, pipe: Connection) -> None:
    node = await Node.join(rank, peers, pipe, NUMEL)
    values = torch.full((NUMEL,), float(rank))
    word = "go"
    while word != "last":
        word = await node.word()
        began = time.monotonic()
        mean = await node.mean(values, Float32())
        pipe.send((began, time.monotonic()))
        assert bool((mean == (peers - 1) / 2).all())
    await node.leave()


class Node:
    """One process's peer, on the transport of a real run, that takes means with the others and does nothing else."""

    def __init__(self, peer: Peer, transport: Transport, pipe: Connection) -> None:
        self._peer, self._transport, self._pipe = peer, transport, pipe
        self._round = 0

    @classmethod
    async def join(cls, rank: int, peers: int, pipe: Connection, numel: int, pace: Pace | None = None) -> Node:
        """Tell the pipe our address, and take everybody's from it."""
        inbox = Inbox()
        transport = Transport(inbox, keys=KEYS, max_packet_bytes=8 * numel, patience_s=60.0, pace=pace)
        pipe.send(await transport.start("127.0.0.1"))
        addresses = await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        world = RealWorld(transport, CoordinatorClient("127.0.0.1:1", rank, KEYS), incarnation=0, speed=1.0)
        replica = cast(Replica, SimpleNamespace(layout=SimpleNamespace(size=numel)))
        members = Members(0, tuple(range(peers)))
        peer = inbox.peer = Peer(world, replica, members, worker=rank, seed=0, steps=1000)
        transport.admit({other: Contact(0, address) for other, address in enumerate(addresses)})
        return cls(peer, transport, pipe)

    async def word(self) -> str:
        """Return what the pipe says next."""
        word: str = await asyncio.get_running_loop().run_in_executor(None, self._pipe.recv)
        return word

    async def mean(self, values: torch.Tensor, codec: Codec) -> torch.Tensor:
        self._round += 1
        mean = await butterfly_mean(self._peer, values, codec, Attempt(self._peer.members, "bench", self._round))
        self._peer.close("bench", self._round)
        return mean

    async def leave(self) -> None:
        await self._transport.drained()
        await self._transport.close()


def gloo(rank: int, peers: int, pipe: Connection) -> None:
    """Take part in a mean whenever the pipe says so."""
    pipe.send(free_port())
    port = pipe.recv()[0]
    group = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=group, rank=rank, world_size=peers)
    values = torch.full((NUMEL,), float(rank))
    word = "go"
    while word != "last":
        word = pipe.recv()
        began = time.monotonic()
        torch.distributed.all_reduce(values)
        values.div_(peers)
        pipe.send((began, time.monotonic()))
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def start(contender: Callable[[int, int, Connection], None], peers: int) -> Callable[[bool], float]:
    """Start the contender's processes; return what has them take one mean, in seconds."""
    context = multiprocessing.get_context("spawn")
    pipes = []
    for rank in range(peers):
        here, there = context.Pipe()
        context.Process(target=_single_threaded, args=(contender, rank, peers, there), daemon=True).start()
        pipes.append(here)
    news = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send(news)

    def turn(last: bool) -> float:
        for pipe in pipes:
            pipe.send("last" if last else "go")
        times = [pipe.recv() for pipe in pipes]
        return float(max(end for _, end in times) - min(began for began, _ in times))

    return turn


def _single_threaded(contender: Callable[[int, int, Connection], None], *args: Any) -> None:
    torch.set_num_threads(1)
    contender(*args)


def start_hivemind(python: Path, peers: int) -> Callable[[bool], float]:
    """Start hivemind's processes in its own environment; return what has them take one mean, in seconds.

    They have found each other and formed their group before the clock starts: what is timed is the all-reduce.
    """
    initial: list[str] = []
    processes = []
    for rank in range(peers):
        command = [str(python), str(HIVEMIND_PEER), str(rank), str(peers), str(NUMEL), *initial]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
        )
        processes.append(process)
        addresses = _line(process)
        initial = initial or addresses

    def tell(word: str) -> list[Any]:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(word + "\n")
        return [_line(process) for process in processes]

    def turn(last: bool) -> float:
        tell("meet")
        times = tell("last" if last else "go")
        return float(max(end for _, end in times) - min(began for began, _ in times))

    return turn


def _line(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("["):  # whatever else it prints is not for us
            return json.loads(line)
    raise RuntimeError("a process of hivemind's ended")


def measure(peers: int) -> None:
    contenders = {"decentral": start(ours, peers), "gloo": start(gloo, peers)}
    python = python_of("hivemind")
    if python is not None:
        contenders["hivemind"] = start_hivemind(python, peers)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for left in reversed(range(TURNS)):
        for name, turn in contenders.items():
            seconds[name].append(turn(left == 0))
    print(f"{peers} peers, {4 * NUMEL / 1e6:.0f} MB")
    for name, times in seconds.items():
        kept = times[WARM:]
        print(f"  {name:10} {statistics.median(kept):6.3f} s  ({min(kept):.3f} to {max(kept):.3f})")
    for name in list(seconds)[1:]:
        ratios = [mine / theirs for mine, theirs in zip(seconds["decentral"], seconds[name], strict=True)][WARM:]
        spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"  decentral / {name}: {statistics.median(ratios):.2f}  {spread}", flush=True)


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    for peers in [int(argument) for argument in sys.argv[1:]] or [2, 4]:
        measure(peers)


if __name__ == "__main__":
    main()
