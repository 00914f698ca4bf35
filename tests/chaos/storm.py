"""A run whose processes are killed and frozen all the time, and what must hold of it all the same.

A `Storm` is the driver of a run without Ray: it holds the coordinator, forks a process for each life of a worker,
replaces those that end, and breaks something every now and then until the run has come far enough to end in peace.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from decentral.config import Run
from decentral.journal import Record, Synced, Trained, record_from
from decentral.workers.coordinator import Coordinator, Gone
from decentral.workers.coordinator_rpc import CoordinatorServer
from decentral.workers.ledger import Ledger
from decentral.workers.transport import call_worker
from tests.chaos.lives import HOST, KEYS, Life

POLL_S = 0.05
STILL_S = 60.0
"""A run in which no round has ended for so long hangs."""
SILENCE_S = 10.0
"""Who is not heard of for so long has stalled."""
PAUSE_S = 0.3
"""Seconds between two faults, on average."""
CALM_SHARE = 0.85
"""Nothing is broken any more once a worker has done so much of its steps."""
STACKS_S = 1.0
"""Seconds that the living have to say where they stand."""
LATE_S = 1.5
"""A driver may hear of a death so much later, as it does from Ray."""
FROZEN_S = 2.0
"""Seconds that a process is frozen, at most, when it shall go on."""
THAW_S = 1.0
"""Seconds after which one thaws that has been replaced."""
AWAY_S = 1.0
"""Seconds until a coordinator is back, at most."""
ENOUGH = 3
"""Nothing is broken while fewer members than these are sound: newcomers need time to come in."""
SPARED = 1
"""Members that are left alone, whatever is broken: a run whose last member is killed is over."""


class Hang(AssertionError):
    """Nothing has moved for too long; the message says where everybody stands."""


class Storm:
    """Breaks a run for as long as it goes on. The seed draws which faults, and when."""

    def __init__(self, run: Run, folder: Path, seed: int) -> None:
        self.records: list[Record] = []
        self.faults: list[tuple[float, str]] = []  # when, by this machine's monotonic clock, and what
        self._run, self._folder, self._seed = run, folder, seed
        self._draw = random.Random(seed)
        self._coordinator: Coordinator | None = None
        self._server: CoordinatorServer
        self._address = ""
        self._lives: dict[int, Life] = {}
        self._lived: Counter[int] = Counter()
        self._broken: set[Life] = set()  # by us, until they are well again or replaced
        self._zombies: set[Life] = set()
        self._over: dict[Life, float] = {}  # when each is noticed to be dead
        self._has_finished = False
        self._joined: dict[int, int] = {}  # each worker's newest life that has joined
        self._taken = 0
        self._step = 0
        self._seen = 0
        self._moved_at = 0.0

    async def pass_over(self) -> None:
        """Run to the end. Raises `Hang`."""
        await self._start_coordinator()
        for worker in range(self._run.fleet.size):
            self._place(worker)
        breaking = asyncio.ensure_future(self._break())
        try:
            while self._lives or self._zombies:
                if breaking.done():
                    breaking.result()
                self._poll()
                self._attend()
                await self._require_movement()
                await asyncio.sleep(POLL_S)
            await breaking
            self._poll()
        finally:
            breaking.cancel()
            await asyncio.gather(breaking, return_exceptions=True)
            for life in [*self._lives.values(), *self._zombies]:
                life.signal(signal.SIGKILL)
                life.process.join()
            await self._server.stop()

    # -- what a driver does ------------------------------------------------------------------------------------------

    async def _start_coordinator(self) -> None:
        coordinator = Coordinator(
            range(self._run.fleet.size),
            silence_s=SILENCE_S,
            call=lambda address: call_worker(address, KEYS),
            ledger=Ledger(self._folder / "ledger"),
        )
        self._server = CoordinatorServer(coordinator, KEYS)
        self._address = await self._server.start(HOST, int(self._address.rpartition(":")[2] or 0))
        self._coordinator = coordinator

    def _place(self, worker: int) -> None:
        number = self._lived[worker]
        self._lived[worker] += 1
        self._lives[worker] = Life(self._run.to_table(), worker, number, self._address, self._folder)

    def _attend(self) -> None:
        """Settle what has ended, and give another life to who is missing."""
        now = time.monotonic()
        self._zombies = {life for life in self._zombies if not life.is_over}
        for life in [life for life in self._lives.values() if life.is_over]:
            noticed = self._over.setdefault(life, now + (0.0 if life.end else self._draw.uniform(0, LATE_S)))
            if life.end == "finished":
                self._has_finished = True
                del self._lives[life.worker]
            elif self._coordinator is not None and now >= noticed:
                self._lose(self._coordinator, life, life.end or "crashed")
        if self._coordinator is not None and not self._has_finished:
            for worker in sorted(set(range(self._run.fleet.size)) - self._lives.keys()):
                self._place(worker)

    def _lose(self, coordinator: Coordinator, life: Life, reason: str) -> None:
        del self._lives[life.worker]
        self._broken.discard(life)
        coordinator.remove(life.worker, life.number, reason)

    def _poll(self) -> None:
        if self._coordinator is None:
            return
        poll = self._coordinator.poll(self._taken)
        self._taken += len(poll["records"])
        fresh = [record_from(fields) for fields in poll["records"]]
        self.records += fresh
        self._joined = dict(poll["lives"])
        self._step = max([self._step, *[record.step for record in fresh if isinstance(record, Trained)]])
        for gone in poll["gone"]:
            self._take_out(self._coordinator, gone)

    def _take_out(self, coordinator: Coordinator, gone: Gone) -> None:
        life = self._lives.get(gone.worker)
        if life is None or life.number != gone.life:
            return
        if life in self._broken and not life.is_over:
            self._zombies.add(life)  # it thaws, and has to find out that it is none of the run any more
            asyncio.get_running_loop().call_later(THAW_S, life.signal, signal.SIGCONT)
        else:
            life.signal(signal.SIGKILL)
        self._lose(coordinator, life, gone.reason)

    # -- faults ------------------------------------------------------------------------------------------------------

    async def _break(self) -> None:
        faults: dict[str, tuple[int, Callable[[], Coroutine[Any, Any, bool]]]] = {  # how often, relatively, and what
            "kill": (3, self._kill),
            "kill two": (1, self._kill_two),
            "kill a newcomer": (1, self._kill_newcomer),
            "kill beside a newcomer": (3, self._kill_beside_newcomer),
            "freeze": (3, self._freeze),
            "freeze until replaced": (1, self._freeze_until_replaced),
            "notice": (2, self._give_notice),
            "kill the coordinator": (1, self._kill_coordinator),
            "kill the coordinator and a worker": (1, self._kill_both),
        }
        weights = [weight for weight, _ in faults.values()]
        while self._step < CALM_SHARE * self._run.steps:
            await asyncio.sleep(self._draw.uniform(0, 2 * PAUSE_S))
            if len(self._able()) < ENOUGH:
                continue
            (name,) = self._draw.choices(list(faults), weights)
            began = time.monotonic()
            if await faults[name][1]():
                self.faults.append((began, name))

    async def _kill(self) -> bool:
        return self._strike(1, signal.SIGKILL)

    async def _kill_two(self) -> bool:
        return self._strike(2, signal.SIGKILL)

    async def _kill_newcomer(self) -> bool:
        newcomers = [life for life in self._lives.values() if life.number and not self._takes_part(life)]
        if newcomers:
            self._draw.choice(newcomers).signal(signal.SIGKILL)
        return bool(newcomers)

    async def _kill_beside_newcomer(self) -> bool:
        """Kill a member while a newcomer is there: maybe its host."""
        assert self._coordinator is not None
        members = self._coordinator.members
        return len(members) > len(members.party()) and self._strike(1, signal.SIGKILL)

    async def _freeze(self) -> bool:
        frozen = self._victims(1)
        for life in frozen:
            life.signal(signal.SIGSTOP)
            await asyncio.sleep(self._draw.uniform(0, FROZEN_S))
            life.signal(signal.SIGCONT)
            self._broken.discard(life)
        return bool(frozen)

    async def _freeze_until_replaced(self) -> bool:
        return self._strike(1, signal.SIGSTOP)

    async def _give_notice(self) -> bool:
        return self._strike(1, signal.SIGTERM)

    async def _kill_coordinator(self) -> bool:
        self._coordinator = None
        await self._server.stop()
        await asyncio.sleep(self._draw.uniform(0, AWAY_S))
        await self._start_coordinator()
        return True

    async def _kill_both(self) -> bool:
        return self._strike(1, signal.SIGKILL) and await self._kill_coordinator()

    def _strike(self, count: int, number: signal.Signals) -> bool:
        victims = self._victims(count)
        for life in victims:
            life.signal(number)
        return bool(victims)

    def _victims(self, count: int) -> list[Life]:
        """Return so many members, from now on broken; none if too few would be left."""
        able = self._able()
        if len(able) < count + SPARED:
            return []
        victims = self._draw.sample(able, count)
        self._broken.update(victims)
        return victims

    def _able(self) -> list[Life]:
        return [life for life in self._lives.values() if self._takes_part(life) and life not in self._broken]

    def _takes_part(self, life: Life) -> bool:
        if self._coordinator is None:
            return False
        there = life.worker in self._coordinator.members.party() and not life.is_over
        return there and self._joined.get(life.worker) == life.number

    # -- what must not be --------------------------------------------------------------------------------------------

    async def _require_movement(self) -> None:
        rounds = sum(isinstance(record, Synced) for record in self.records[self._seen :])
        self._seen = len(self.records)
        now = time.monotonic()
        if rounds or not self._moved_at:
            self._moved_at = now
        if now - self._moved_at < STILL_S:
            return
        there = [life for life in [*self._lives.values(), *self._zombies] if not life.is_over]
        for life in there:
            life.signal(signal.SIGCONT)
            life.signal(signal.SIGUSR1)
        await asyncio.sleep(STACKS_S)
        stacks = "\n".join(f"-- {life}\n{life.stacks}" for life in there)
        members = None if self._coordinator is None else self._coordinator.members
        raise Hang(f"seed {self._seed}: no round for {STILL_S:g} s after {self.faults[-10:]}; {members}\n{stacks}")
