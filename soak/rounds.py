"""Ten thousand rounds over real sockets, with peers killed and started again: what grows, leaks.

    python -m soak.rounds [--rounds 10000] [--seed 0]

Four processes exchange a small vector in random pairs. Two of them are killed (SIGKILL) again and again, at random, and
come back as new incarnations. The two that live on report resident memory, tasks, threads and open files as they go.
At the end none of these may have grown, and the exchanges between live workers must have been applied.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from decentral.inner import SGD
from decentral.journal import Record, Synced
from decentral.members import Members
from decentral.peer import Peer
from decentral.protocols import Int8, RandomGroups
from decentral.protocols.collectives import exchange
from decentral.replica import TorchReplica
from decentral.tasks import Quadratic
from decentral.workers.rpc import Keys
from decentral.workers.transport import Contact, Transport
from decentral.workers.world import Inbox, RealWorld

WORKERS = 4
MORTALS = (2, 3)
DIMENSION = 4096
REPORT_EVERY = 100
NOTICE = 200
"""Rounds between the news of a join and the round from which it counts: nobody is further ahead than that.

The newcomer itself is let go when all others have come there. Otherwise one late pair makes the next ones late, and
with a fixed patience everybody gives everybody up for ever.
"""
QUIET_END = 2000
"""Nobody is killed in so many last rounds: a process takes seconds to start, and the others do not wait for it."""
GROWTH = 1.05
"""How much more memory, at the most, in the last tenth of the run than after the first quarter."""
KEYS = Keys("the secret of a soak run")


@dataclass
class Change:
    """Who is in the run from round `first` on."""

    members: Members
    contacts: Mapping[int, Contact]
    first: int


# -- a worker ----------------------------------------------------------------------------------------------------------


class _World(RealWorld):
    """A worker's world without a coordinator: records are counted."""

    def __init__(self, transport: Transport, incarnation: int) -> None:
        super().__init__(transport, None, incarnation=incarnation, speed=1.0)  # type: ignore[arg-type]
        self.committed = 0

    def record(self, record: Record) -> None:
        self.committed += isinstance(record, Synced) and record.outcome == "committed" and len(record.members) > 1


def _worker(worker: int, incarnation: int, rounds: int, pipe: Connection) -> None:
    asyncio.run(_work(worker, incarnation, rounds, pipe))


async def _work(worker: int, incarnation: int, rounds: int, pipe: Connection) -> None:
    task = Quadratic(dimension=DIMENSION)  # first: the others wait from the moment they know where we listen
    replica = TorchReplica(task, SGD(lr=0.1), worker=worker, seed=0, batch_size=1, total_steps=rounds)
    inbox = Inbox()
    transport = Transport(inbox, keys=KEYS, max_packet_bytes=1 << 20, patience_s=5.0)
    pipe.send(await transport.start("127.0.0.1"))
    loop, changes = asyncio.get_running_loop(), asyncio.Queue[Change]()
    loop.add_reader(pipe.fileno(), lambda: changes.put_nowait(pipe.recv()))
    change = await changes.get()
    world = _World(transport, incarnation)
    peer = inbox.peer = Peer(world, replica, change.members, worker=worker, seed=0, steps=rounds, patience_s=5.0)
    peer.cohort = Members(0, tuple(range(WORKERS)))
    transport.admit(change.contacts)
    for _ in range(change.first - 1):
        peer.next_round("pair")
    number = change.first
    pending: list[Change] = []

    def apply() -> None:
        """Hear of a death at once, in mid-round; of a join before its round."""
        while pending and pending[0].first <= number:
            change = pending.pop(0)
            transport.admit(change.contacts)
            peer.changed(change.members)

    def told() -> None:
        try:
            pending.append(pipe.recv())
        except EOFError:  # the driver is gone
            os._exit(1)
        apply()

    loop.add_reader(pipe.fileno(), told)
    topology = RandomGroups()
    for number in range(change.first, rounds + 1):
        apply()
        links = topology.links(peer, round_ := peer.next_round("pair"))
        await exchange(peer, links, peer.params, Int8(), round_=round_)
        await asyncio.sleep(0)
        if number % REPORT_EVERY == 0:
            pipe.send(
                (number, _resident(), len(asyncio.all_tasks()), threading.active_count(), _files(), world.committed)
            )
    await transport.drained()
    loop.remove_reader(pipe.fileno())
    await transport.close()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _files() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- the run -----------------------------------------------------------------------------------------------------------


@dataclass
class Life:
    """One incarnation of a worker, as the driver sees it."""

    process: Any
    pipe: Connection
    contact: Contact
    reports: list[tuple[int, ...]] = field(default_factory=list)


class Soak:
    """Starts, kills and restarts the workers, and keeps what they report."""

    def __init__(self, rounds: int, seed: int) -> None:
        self._rounds = rounds
        self._random = random.Random(seed)
        self._spawn = multiprocessing.get_context("spawn")
        self._epoch = 0
        self._newcomers: dict[int, int] = {}  # the round in which each begins
        self._lives: dict[int, Life] = {}
        self._done: set[int] = set()
        self.killed: list[int] = []

    def run(self) -> dict[int, Life]:
        """Return the workers as they ended."""
        for worker in range(WORKERS):
            self._lives[worker] = self._begin(worker, 0)
        self._tell(first=1)
        back: dict[int, int] = {}  # round at which a killed worker is started again
        next_kill = self._interval()
        while len(self._done) < len(self._lives):
            wait([life.pipe for worker, life in self._lives.items() if worker not in self._done], timeout=60.0)
            reached = self._hear()
            whole = not (back or self._newcomers)  # one is away at a time: who waits to come in counts for nobody yet
            if whole and reached > next_kill and reached + QUIET_END < self._rounds:
                victim = self._random.choice([worker for worker in MORTALS if worker in self._lives])
                self._kill(victim)
                back[victim] = reached + self._random.randint(0, 3) * REPORT_EVERY
                next_kill = reached + self._interval()
            for worker in [worker for worker, when in back.items() if reached >= when]:
                del back[worker]
                self._lives[worker] = self._begin(worker, len(self.killed))
                self._tell(first=self._hear() + NOTICE + 1, newcomer=worker)  # the others went on meanwhile
            self._let_go()
        return self._lives

    def _hear(self) -> int:
        """Take the reports that have come; return the highest round in one."""
        for worker, life in self._lives.items():
            try:
                while worker not in self._done and life.pipe.poll():
                    life.reports.append(life.pipe.recv())
            except (EOFError, ConnectionResetError):
                self._done.add(worker)
        return max(life.reports[-1][0] if life.reports else 0 for life in self._lives.values())

    def _begin(self, worker: int, incarnation: int) -> Life:
        ours, theirs = self._spawn.Pipe()
        process = self._spawn.Process(target=_worker, args=(worker, incarnation, self._rounds, theirs), daemon=True)
        process.start()
        theirs.close()
        return Life(process, ours, Contact(incarnation, ours.recv()))

    def _kill(self, worker: int) -> None:
        life = self._lives.pop(worker)
        self._newcomers.pop(worker, None)
        life.process.kill()
        life.process.join()
        life.pipe.close()
        self.killed.append(worker)
        self._tell(first=0)

    def _let_go(self) -> None:
        """Start the newcomers for whom the others have made room."""
        for worker, first in list(self._newcomers.items()):
            others = [life.reports for other, life in self._lives.items() if other not in self._newcomers]
            if all(reports and reports[-1][0] >= first - 1 for reports in others):
                del self._newcomers[worker]
                self._lives[worker].pipe.send(self._change(first))

    def _tell(self, first: int, newcomer: int | None = None) -> None:
        self._epoch += 1
        change = self._change(first)
        for worker, life in self._lives.items():
            if worker == newcomer:
                self._newcomers[worker] = first
            elif worker not in self._newcomers:
                life.pipe.send(change)

    def _change(self, first: int) -> Change:
        contacts = {worker: life.contact for worker, life in self._lives.items()}
        return Change(Members(self._epoch, tuple(contacts), departed=tuple(self.killed)), contacts, first)

    def _interval(self) -> int:
        return self._random.randint(4, 10) * REPORT_EVERY


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    soak = Soak(options.rounds, options.seed)
    lives = soak.run()
    table = Table("worker", "committed", "resident MB, early", "late", "tasks", "threads", "files")
    sound = True
    for worker in sorted(set(lives) - set(MORTALS)):
        reports = lives[worker].reports
        early, late = reports[len(reports) // 4 : len(reports) // 2], reports[-max(1, len(reports) // 10) :]
        before, after = ([statistics.median(column) for column in zip(*part, strict=True)] for part in (early, late))
        sound &= after[1] <= GROWTH * before[1] and all(after[i] <= before[i] + 2 for i in (2, 3, 4))
        sound &= reports[-1][0] == options.rounds // REPORT_EVERY * REPORT_EVERY and reports[-1][5] > options.rounds / 2
        counts = [f"{before[i]:g} -> {after[i]:g}" for i in (2, 3, 4)]
        table.add_row(str(worker), str(reports[-1][5]), f"{before[1] / 1e6:.1f}", f"{after[1] / 1e6:.1f}", *counts)
    Console().print(table)
    print(f"{options.rounds} rounds, {len(soak.killed)} kills, {time.monotonic() - began:.0f} s")
    if not sound:
        sys.exit("something has grown, or rounds were lost")


if __name__ == "__main__":
    main()
