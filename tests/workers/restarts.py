"""Runs of a coordinator without workers: what these would ask, drawn from a seed, and one that dies in the midst."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from decentral.journal import Joined, Metered, Record, Settled, Synced, Trained
from decentral.leases import LeaseBook, Request
from decentral.members import Ballot, Decision
from decentral.workers.coordinator import Coordinator, Entrant, Refused
from decentral.workers.ledger import Ledger
from decentral.workers.reports import Fields, plain
from decentral.workers.transport import Sign

WORKERS = 4
BATCH = 2


class Call(NamedTuple):
    """What somebody asks of the coordinator, and on whose behalf, if it is a worker's."""

    method: str
    arguments: tuple[Any, ...]
    seat: tuple[int, int] | None = None


async def sign_of(address: str) -> Sign:
    """Return what is heard at an address: always the same."""
    return random.Random(address).choice(("gone", "gone", "silent", "alive"))


class Watched(Ledger):
    """Keeps what is in its file after each write."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._at = path
        self.versions: list[bytes] = []
        self.began_anew = 0

    def append(self, entry: Any) -> None:
        super().append(entry)
        self.versions.append(self._at.read_bytes())

    def begin_anew(self, entry: Any) -> None:
        super().begin_anew(entry)
        self.versions.append(self._at.read_bytes())
        self.began_anew += 1


class Held:
    """A coordinator with its ledger, and the calls that it has not answered yet."""

    def __init__(self, path: Path, now: list[float]) -> None:
        self.ledger = Watched(path)
        self.coordinator = Coordinator(
            range(WORKERS),
            silence_s=1e9,
            clock=lambda: now[0],
            call=sign_of,
            ledger=self.ledger,
            book=LeaseBook(BATCH, total=400),
        )
        self.open: dict[int, tuple[Call, asyncio.Task[Any]]] = {}
        self.answers: dict[int, Any] = {}

    async def ask(self, number: int, call: Call) -> None:
        """Have the call made, and whatever it leads to."""
        try:
            if call.seat is not None:
                self.coordinator.require_seat(*call.seat)
            answer = getattr(self.coordinator, call.method)(*call.arguments)
        except Refused as error:
            answer = str(error)
        if isinstance(answer, Coroutine):
            self.open[number] = call, asyncio.ensure_future(answer)
        else:
            self.answers[number] = answer
        for _ in range(5):
            await asyncio.sleep(0)
        for number, (_, task) in list(self.open.items()):
            if task.done():
                del self.open[number]
                self.answers[number] = task.exception() or task.result()

    def picture(self, taken: int) -> dict[str, Any]:
        """Return all that anybody can be told, but how long ago workers were heard."""
        coordinator = self.coordinator
        status = coordinator.status("a run")
        for worker in status["workers"]:
            worker["heard_s"] = None
        return {
            "status": status,
            "members": coordinator.members.plain(),
            "contacts": coordinator.contacts,
            "lines before": coordinator.lines_before,
            "poll": {**coordinator.poll(taken), "news": []},
        }

    async def end(self) -> None:
        for _, task in self.open.values():
            task.cancel()
        await asyncio.gather(*[task for _, task in self.open.values()], return_exceptions=True)


class Crew:
    """What workers and driver of a run ask next; they know what they were answered."""

    def __init__(self, seed: int, held: Held) -> None:
        self._draw, self._held = random.Random(seed), held
        self._lives = [0] * WORKERS
        self._reported = [0] * WORKERS
        self._granted = [0] * WORKERS
        self._rounds = [1] * WORKERS
        self._votes: dict[int, int] = {}  # by worker, the number of its open vote
        self.taken = 0

    def calls(self, count: int) -> Iterator[Call]:
        """Yield so many calls, each made from what the ones before have come to."""
        yield from (self._join(worker) for worker in range(WORKERS))
        for number in range(WORKERS, count):
            here = [worker for worker in self._held.coordinator.members if worker not in self._votes]
            away = [worker for worker in range(WORKERS) if worker not in self._held.coordinator.members]
            kinds = {"poll": 1, "take out": 0.6, "join": 2 if away else 0}
            kinds |= {"vote": 8, "report": 4, "lease": 2, "leave": 0.1, "host": 0.3} if here else {}
            (kind,) = self._draw.choices(list(kinds), list(kinds.values()))
            if kind == "vote":
                worker = self._draw.choice(here)
                self._votes[worker] = number
                yield self._vote(worker)
            elif kind == "join":
                yield self._join(self._draw.choice(away), again=True)
            elif kind == "poll":
                poll = self._held.coordinator.poll(self.taken)
                self.taken += self._draw.randint(0, len(poll["records"]))
                yield Call("poll", (self.taken,))
            elif kind == "take out":
                yield self._take_out(self._draw.randrange(WORKERS))
            else:
                worker = self._draw.choice(here)
                yield getattr(self, f"_{kind}")(worker)
            self._hear()

    def _hear(self) -> None:
        for worker, number in list(self._votes.items()):
            answer = self._held.answers.get(number)
            if isinstance(answer, Decision):
                self._rounds[worker] += answer.outcome != "again"
            if answer is not None:
                del self._votes[worker]

    def _seat(self, worker: int) -> tuple[int, int]:
        contact = self._held.coordinator.contacts[worker]
        return worker, contact.incarnation

    def _join(self, worker: int, again: bool = False) -> Call:
        self._lives[worker] += again
        self._reported[worker] = self._granted[worker] = 0
        self._rounds[worker] = max(self._rounds)
        address = f"10.0.0.{worker}:{self._lives[worker]}"
        return Call("join", (Entrant(worker, self._lives[worker], address, 7, 100),))

    def _vote(self, worker: int) -> Call:
        party = self._held.coordinator.members.party("sync")
        digest = self._draw.choice((7, 7, 7, 7, 8, None))
        epoch = max(0, party.epoch - self._draw.choice((0, 0, 0, 1)))
        return Call("vote", (Ballot(worker, "sync", self._rounds[worker], epoch, digest),), self._seat(worker))

    def _host(self, worker: int) -> Call:
        return Call("vote", (Ballot(worker, "", 0, 0, None),), self._seat(worker))

    def _report(self, worker: int) -> Call:
        first = self._reported[worker]
        records = [plain(self._record(worker)) for _ in range(self._draw.randint(1, 3))]
        if not first:
            records[0] = plain(Joined(time_s=1.0, worker=worker, parameters=100))
        self._reported[worker] += len(records)
        return Call("report", (worker, first, records), self._seat(worker))

    def _record(self, worker: int) -> Record:
        draw, time_s = self._draw, self._draw.uniform(1, 99)
        step = draw.randrange(100)
        records: list[Record] = [
            Trained(time_s=time_s, worker=worker, step=step, steps=1, samples=2, seconds=draw.random(), loss=1.0),
            Synced(
                time_s=time_s,
                worker=worker,
                channel="sync",
                round=step,
                outcome="committed",
                members=(0, 1),
                sent_bytes=step,
            ),
            Metered(
                time_s=time_s,
                worker=worker,
                seconds={"compute": time_s, "wait": 1.5},
                loading_s=0.5,
                received_bytes=9,
                sent=((1, 99, 0.25),),
            ),
            Settled(time_s=time_s, worker=worker, samples=BATCH),
        ]
        return draw.choice(records)

    def _lease(self, worker: int) -> Call:
        known = self._granted[worker]
        self._granted[worker] += BATCH * self._draw.randint(1, 3)
        return Call("lease", (Request(worker, known, self._granted[worker], 3),), self._seat(worker))

    def _leave(self, worker: int) -> Call:
        fields: list[Fields] = []
        return Call("leave", (*self._seat(worker), self._reported[worker], fields, self._draw.random() < 0.2))

    def _take_out(self, worker: int) -> Call:
        contacts = self._held.coordinator.contacts
        if worker in contacts and self._draw.random() < 0.7:
            return Call("suspect", (worker, contacts[worker].incarnation))
        return Call("remove", (worker, self._lives[worker], "crashed"))
