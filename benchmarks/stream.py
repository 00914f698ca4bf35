"""What streams cost the training beside them, and what a limit on them gives back.

    python -m benchmarks.stream

One process trains the byte GPT (batch 8, AdamW, one thread) while its transport receives or sends packets of 16 MB
without a pause, held to a rate in MB/s ("free" is unlimited). The process at the other end takes a share of the same
cores. So the same traffic is also measured "beside", between two other processes: what that costs, a data plane in a
process of its own would cost too. Printed is the speed of training as a share of the quiet turns before and after,
and what the streams took of a core in the training process: in CPU time, which others on the machine disturb least.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import threading
import time
from multiprocessing.connection import Connection

import torch

from decentral.config import Run
from decentral.replica import TorchReplica
from decentral.wire import FrameError, Header, Packet, Tag, pack_header
from decentral.workers.buffers import prepare_memory
from decentral.workers.pace import Pace
from decentral.workers.rpc import Keys
from decentral.workers.transport import Contact, Transport

KEYS = Keys("the secret of this benchmark")
NBYTES = 16_000_000
TURN_S = 0.7
TURNS = 3
RATES = {"12.5": 100e6, "25": 200e6, "50": 400e6, "125": 1e9, "free": None}
HERE, THERE, ELSEWHERE = 0, 1, 2


class Counter:
    """Counts what comes in."""

    def __init__(self) -> None:
        self.nbytes = 0

    def begin(self) -> None: ...

    def deliver(self, header: Header, packet: Packet, nbytes: int) -> None:
        self.nbytes += nbytes

    def end(self) -> None: ...

    def refuse(self, source: int, error: FrameError) -> None: ...


class Node:
    """A transport on an event loop in a thread of its own; only this one limits its rate."""

    def __init__(self, worker: int) -> None:
        self.worker = worker
        self.counter = Counter()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.transport = self.do(self._start())
        self.address = self.do(self.transport.start("127.0.0.1"))
        self.streaming: asyncio.Task[None] | None = None

    def do(self, work):  # type: ignore[no-untyped-def]
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def _start(self) -> Transport:
        return Transport(self.counter, keys=KEYS, max_packet_bytes=4 * NBYTES, patience_s=60.0)

    async def admit(self, addresses: list[str]) -> None:
        self.transport.admit({worker: Contact(0, address) for worker, address in enumerate(addresses)})

    async def limit(self, bits_per_s: float | None) -> None:
        self.transport.pace = Pace(training_bps=bits_per_s)
        self.transport.pace.training = True

    async def stream(self, to: int | None) -> None:
        """From now on send packets to that worker, one after the other; None: no more."""
        if self.streaming is not None:
            self.streaming.cancel()
            await asyncio.wait([self.streaming])
        self.streaming = None if to is None else self.loop.create_task(self._send(to))

    async def _send(self, to: int) -> None:
        packet = Packet("float32", NBYTES // 4, NBYTES, torch.zeros(NBYTES, dtype=torch.uint8))
        header = pack_header(Header(self.worker, 0, Tag("bench", 1), packet.codec, packet.numel, packet.nbytes))
        while True:
            await self.transport.send(to, header, packet)


def other(worker: int, pipe: Connection) -> None:
    """A process at the other end, which does as it is told."""
    prepare_memory()
    node = Node(worker)
    pipe.send(node.address)
    node.do(node.admit(pipe.recv()))
    while (told := pipe.recv()) is not None:
        limit, to = told
        node.do(node.limit(limit))
        node.do(node.stream(to))
        pipe.send(None)


def main() -> None:
    torch.set_num_threads(1)
    prepare_memory()
    run = Run()
    replica = TorchReplica(
        run.make_task(), run.inner, worker=0, seed=0, batch_size=8, total_steps=10**6, device=torch.device("cpu")
    )
    node = Node(HERE)
    context = multiprocessing.get_context("spawn")
    pipes = []
    for worker in (THERE, ELSEWHERE):
        here, there = context.Pipe()
        context.Process(target=other, args=(worker, there), daemon=True).start()
        pipes.append(here)
    addresses = [node.address, *(pipe.recv() for pipe in pipes)]
    node.do(node.admit(addresses))
    for pipe in pipes:
        pipe.send(addresses)

    def steps_a_second() -> tuple[float, float]:
        """Return the speed of training, and the share of a core that all other threads of this process took."""
        others = time.process_time() - time.thread_time()
        began, steps = time.perf_counter(), 0
        while (seconds := time.perf_counter() - began) < TURN_S:
            replica.train(0, 1)
            steps += 1
        return steps / seconds, (time.process_time() - time.thread_time() - others) / seconds

    def traffic(kind: str, limit: float | None) -> None:
        there = {"receives": HERE, "beside": ELSEWHERE}.get(kind)
        node.do(node.limit(limit))
        node.do(node.stream(THERE if kind == "sends" else None))
        for pipe, to in zip(pipes, (there, None), strict=True):
            pipe.send((limit if kind == "beside" else None, to))
            pipe.recv()

    cases = [(kind, rate) for kind in ("receives", "sends", "beside") for rate in RATES]
    ratios: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    shares: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    speeds: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    steps_a_second()
    quiet = [steps_a_second()[0]]
    for _ in range(TURNS):
        for case in cases:
            traffic(case[0], RATES[case[1]])
            before = node.counter.nbytes
            began = time.perf_counter()
            busy, share = steps_a_second()
            speeds[case].append((node.counter.nbytes - before) / (time.perf_counter() - began) / 1e6)
            traffic("quiet", None)
            shares[case].append(share)
            quiet.append(steps_a_second()[0])
            ratios[case].append(2 * busy / (quiet[-2] + quiet[-1]))
    for pipe in pipes:
        pipe.send(None)
    print(f"quiet: {statistics.median(quiet):.1f} steps/s  ({min(quiet):.1f} to {max(quiet):.1f})")
    for (kind, rate), found in ratios.items():
        spread = f"({min(found):.2f} to {max(found):.2f})"
        came = f", {statistics.median(speeds[kind, rate]):.0f} MB/s came" if kind == "receives" else ""
        share = f"{statistics.median(shares[kind, rate]):.1%} of a core"
        print(f"{kind:9} {rate:>5} MB/s: {statistics.median(found):.2f} of the quiet speed  {spread}, {share}{came}")


if __name__ == "__main__":
    main()
