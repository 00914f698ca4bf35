"""How long a worker takes to come into a run, against the time that its state takes on the wire.

    python -m benchmarks.joining

A worker trains; another one, in a process of its own, asks it for its state over the loopback. Measured is the time
from then until the newcomer begins its first local step that counts, for states of 10, 100 and 500 MB: of a rule whose
newcomers take part at once (gossip), and of one whose rounds are voted on (DiLoCo), which it has to hear meanwhile.
With `--cold` it is also measured from the start of a process that has yet to import what a worker needs (without Ray's
part). Beside it, in the same turn and between the same two processes: the same bytes over the workers' own transport,
segment by segment as a state goes, and over a bare socket. A state is given between two local steps, which go on while
it travels: they are short, but take a core from the wire. `--period` is how many of them there are in a phase. With
`--mbps` the workers' transport holds their lines to a rate; the bare socket's has none then.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import multiprocessing
import socket
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from decentral.config import Run, validated
from decentral.journal import Joined, Record, Trained, record_from
from decentral.protocols.joining import IN_FLIGHT, segments_of
from decentral.task import Task
from decentral.wire import FrameError, Header, Packet, Tag, pack_header
from decentral.workers.buffers import prepare_memory
from decentral.workers.coordinator import Coordinator
from decentral.workers.coordinator_rpc import CoordinatorServer
from decentral.workers.pace import Pace
from decentral.workers.rpc import Keys
from decentral.workers.transport import Contact, Transport
from decentral.workers.worker import Place, live

KEYS = Keys("the secret of this benchmark")
HERE, THERE = 0, 1
MB = 10**6
RULES: dict[str, tuple[dict[str, Any], int]] = {
    "gossip": ({"name": "gossip"}, 3),
    "diloco": ({"name": "diloco"}, 5),
}
"""Rules, and how many vectors of the model's size their state has: parameters, two means of AdamW, the rule's slots."""


class Idle(Task):
    """A model of `parameters` elements whose loss looks at a few: a local step costs what the optimiser takes."""

    name: ClassVar[str] = ""
    parameters: int

    def model(self) -> nn.Module:
        return nn.Linear(self.parameters, 1, bias=False)

    def batch(self, worker: int, start: int, size: int) -> Tensor:
        return torch.zeros(size)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        loss: Tensor = next(model.parameters())[0, :8].square().mean() + batch.mean()
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": 0.0}


class Inbox:
    """Counts what comes in, and says when all of it is here."""

    def __init__(self) -> None:
        self.missing = 0
        self.done = asyncio.Event()

    def begin(self) -> None: ...

    def deliver(self, header: Header, packet: Packet, nbytes: int) -> None:
        self.missing -= packet.nbytes
        if not self.missing:
            self.done.set()

    def end(self) -> None: ...

    def refuse(self, source: int, error: FrameError) -> None:
        raise error


async def _transport(inbox: Inbox, pipe: Connection, worker: int, bps: float) -> Transport:
    """Return a transport that knows the one at the pipe's other end; its line carries so many bits a second."""
    pace = Pace(up_bps=bps, down_bps=bps)
    transport = Transport(inbox, keys=KEYS, max_packet_bytes=1 << 30, patience_s=600.0, pace=pace)
    address = await transport.start("127.0.0.1")
    pipe.send(address)
    other = await asyncio.to_thread(pipe.recv)
    addresses = {worker: address, 1 - worker: other}
    transport.admit({each: Contact(0, addresses[each]) for each in (HERE, THERE)})
    return transport


async def _send(pipe: Connection, nbytes: int, bps: float) -> float:
    """Return the seconds that so many bytes take over the transport, until the other side has them all."""
    transport = await _transport(Inbox(), pipe, HERE, bps)
    packets = [
        Packet("float32", stop - start, 4 * (stop - start), torch.ones(stop - start).view(torch.uint8))
        for _, start, stop in segments_of([("", nbytes // 4)])
    ]
    began, flights = time.perf_counter(), deque[Awaitable[None]]()
    for index, packet in enumerate(packets):
        if len(flights) == IN_FLIGHT:
            await flights.popleft()
        header = pack_header(Header(HERE, 0, Tag("bench", index), packet.codec, packet.numel, packet.nbytes))
        flights.append(transport.send(THERE, header, packet))
    await asyncio.to_thread(pipe.recv)
    seconds = time.perf_counter() - began
    await transport.close()
    return seconds


async def _receive(pipe: Connection, nbytes: int, bps: float) -> None:
    inbox = Inbox()
    inbox.missing = nbytes
    transport = await _transport(inbox, pipe, THERE, bps)
    await inbox.done.wait()
    pipe.send(None)
    await transport.close()


def over_the_transport(pipe: Connection, bps: float, nbytes: int) -> float:
    pipe.send(("transport", (nbytes, bps)))
    return asyncio.run(_send(pipe, nbytes, bps))


def over_a_socket(pipe: Connection, nbytes: int) -> float:
    data: Any = torch.ones(nbytes // 4).view(torch.uint8).numpy()
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(("socket", (server.getsockname(), nbytes)))
        connection, _ = server.accept()
        with connection:
            began = time.perf_counter()
            connection.sendall(data)
            connection.recv(1)
            return time.perf_counter() - began


def _take_from_socket(address: tuple[str, int], nbytes: int) -> None:
    memory: Any = torch.empty(nbytes, dtype=torch.uint8).numpy()
    view = memoryview(memory)
    with socket.create_connection(address) as connection:
        place = 0
        while place < nbytes:
            place += connection.recv_into(view[place:])
        connection.sendall(b"x")


def run_of(rule: str, period: int, bps: float, state_bytes: int) -> Run:
    fields, vectors = RULES[rule]
    line = {"up_bps": bps, "down_bps": bps} if bps < math.inf else {}
    return validated(
        {
            "steps": 10**6,
            "batch_size": 1,
            "evaluate_every": 0,
            "norm_limit": 0.0,
            "task": {"name": "benchmarks.joining:Idle", "parameters": state_bytes // 4 // vectors},
            "inner": {"name": "adamw", "lr": 0.001},
            "rule": {**fields, "period": period},
            "patience_s": 600.0,
            "fleet": {"workers": [{"count": 2}], **line},
            "real": {"shape_links": bool(line)},
        },
        "joining",
    )


def joining(pipe: Connection, rule: str, period: int, bps: float, state_bytes: int) -> float:
    """Return the seconds from when the other process's worker asks ours for its state until it trains."""
    asked, trains = asyncio.run(_join(pipe.send, pipe, run_of(rule, period, bps, state_bytes)))
    return trains - asked


def starting(rule: str, period: int, bps: float, state_bytes: int) -> float:
    """Return the seconds from when a process is started until the worker in it trains, with our worker's state."""
    pipe, process = spawned()
    started = 0.0

    def begin(order: object) -> None:
        nonlocal started
        started = time.perf_counter()
        process.start()
        pipe.send(order)

    _, trains = asyncio.run(_join(begin, pipe, run_of(rule, period, bps, state_bytes)))
    pipe.send(None)
    process.join()
    return trains - started


async def _join(begin: Callable[[object], None], pipe: Connection, run: Run) -> tuple[float, float]:
    """Have `begin` pass an order to the process at the pipe's other end; return when its worker asks, and trains."""
    coordinator = Coordinator((HERE, THERE), silence_s=math.inf)
    server = CoordinatorServer(coordinator, KEYS)
    place = Place(await server.start("127.0.0.1", 0), KEYS, "127.0.0.1", torch.device("cpu"))
    host = asyncio.ensure_future(live(run, HERE, 0, place))
    while coordinator.poll(0)["joined"] == 0:
        await asyncio.sleep(0.01)
    coordinator.begin()
    began = time.perf_counter()
    begin(("newcomer", (run, place.coordinator)))
    while (times := _times([record_from(fields) for fields in coordinator.poll(0)["records"]])) is None:
        await asyncio.sleep(0.1)
    pipe.send(None)
    await asyncio.to_thread(pipe.recv)
    host.cancel()
    await asyncio.gather(host, return_exceptions=True)
    await server.stop()
    came, trained = times
    return began + came, began + trained


def _times(records: Sequence[Record]) -> tuple[float, float] | None:
    """Return when the newcomer came, and began its first step on samples; None if it has not ended that."""
    came = [record.time_s for record in records if record.worker == THERE and isinstance(record, Joined)]
    trained = [r for r in records if r.worker == THERE and isinstance(r, Trained) and r.samples]
    return (came[0], trained[0].time_s - trained[0].seconds) if trained else None


async def _come(pipe: Connection, run: Run, coordinator: str) -> None:
    life = asyncio.ensure_future(live(run, THERE, 0, Place(coordinator, KEYS, "127.0.0.1", torch.device("cpu"))))
    await asyncio.wait([life, asyncio.ensure_future(asyncio.to_thread(pipe.recv))], return_when="FIRST_COMPLETED")
    life.cancel()
    await asyncio.gather(life, return_exceptions=True)
    pipe.send(None)


def other(pipe: Connection) -> None:
    """The process at the other end, which does as it is told."""
    torch.set_num_threads(1)
    prepare_memory()
    while (told := pipe.recv()) is not None:
        match told:
            case ("transport", (nbytes, bps)):
                asyncio.run(_receive(pipe, nbytes, bps))
            case ("socket", (address, nbytes)):
                _take_from_socket(address, nbytes)
            case ("newcomer", (run, coordinator)):
                asyncio.run(_come(pipe, run, coordinator))


def spawned() -> tuple[Connection, BaseProcess]:
    """Return a process that will do as it is told, and our end of the pipe to it."""
    context = multiprocessing.get_context("spawn")
    pipe, there = context.Pipe()
    return pipe, context.Process(target=other, args=(there,), daemon=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 500], help="of the state, in MB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--period", type=int, default=1, help="local steps between rounds")
    parser.add_argument("--mbps", type=float, default=math.inf, help="what the workers' lines carry; the loopback's")
    parser.add_argument("--cold", action="store_true", help="time newcomers from the start of their process, too")
    options = parser.parse_args()
    bps = 1e6 * options.mbps
    torch.set_num_threads(1)
    prepare_memory()
    pipe, process = spawned()
    process.start()
    cases: dict[str, Callable[[int], float]] = {
        "bare socket": partial(over_a_socket, pipe),
        "transport": partial(over_the_transport, pipe, bps),
        **{f"joins {rule}": partial(joining, pipe, rule, options.period, bps) for rule in RULES},
    }
    if options.cold:
        cases |= {f"cold {rule}": partial(starting, rule, options.period, bps) for rule in RULES}
    for size in options.sizes:
        found: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(options.repeats):
            for name, measure in cases.items():
                found[name].append(measure(size * MB // 240 * 240))  # whole vectors of float32 in every state
        copy = statistics.median(found["transport"])
        for name, seconds in found.items():
            median = statistics.median(seconds)
            spread = f"({min(seconds):.3f} to {max(seconds):.3f})"
            print(
                f"{size:4} MB, {name:12}: {median:.3f} s  {spread}, {median / copy:.2f} of the transport's", flush=True
            )
    pipe.send(None)
    process.join()


if __name__ == "__main__":
    main()
