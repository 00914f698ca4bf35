"""The coordinator: who is in the run, what rounds came to, and where records go. Tensors never pass through it.

`Coordinator` holds the state and does no I/O but for its ledger, from which another one goes on when its process has
died: workers train meanwhile, and repeat what they had no answer to. `coordinator_rpc.py` is its gRPC side.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypedDict

from pydantic import TypeAdapter, ValidationError

from decentral.checkpoint import Desk
from decentral.errors import ConfigError
from decentral.grid import WHOLE, Grid
from decentral.journal import KINDS, Record, record_from
from decentral.leases import Grant, LeaseBook, Request
from decentral.members import Ballot, Decision, Entry, Members, Roster
from decentral.protocols.joining import host_for
from decentral.workers.ledger import Ledger
from decentral.workers.reports import Fields, Reports, plain
from decentral.workers.resume import Resumption
from decentral.workers.status import Attendance, Status
from decentral.workers.transport import Contact, Sign

WATCH_S = 10.0
"""A watch that has nothing to tell is answered after so many seconds, and asked again."""
SILENCE_S = 15.0
"""A worker that gives no sign of life for so long (or for the run's patience, if that is longer) has stalled."""


class Refused(Exception):
    """A request that cannot be granted; the message is for the one who asked."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entrant:
    """A worker that wants to join: in which life, where it listens, and the weights it starts from, of which stage."""

    worker: int
    life: int
    address: str
    digest: int
    parameters: int
    stage: int = 0


class Seat(NamedTuple):
    """An entrant that has joined. A newcomer gets its state from the member `host`; who was there at first has none.

    It is the newcomer itself if nobody else holds its stage of the model: the others of its row let it in.
    """

    entrant: Entrant
    incarnation: int
    host: int | None


class Welcome(NamedTuple):
    """What a worker is told when it may begin, `elapsed_s` seconds into the run."""

    incarnation: int
    host: int | None
    elapsed_s: float
    members: Members
    contacts: dict[int, Contact]


class Gone(NamedTuple):
    """A life of a worker that the coordinator has taken out of the run, and why."""

    worker: int
    life: int
    reason: str


class Poll(TypedDict):
    """What the driver asks for again and again.

    `lives` are the newest (worker, life) that have joined, `news` what has come of checkpoints.
    """

    records: list[Fields]
    joined: int
    begun: bool
    lives: list[tuple[int, int]]
    members: list[int]
    gone: list[Gone]
    news: list[str]


async def _silent(address: str) -> Sign:
    return "silent"


class Coordinator:
    """One run's membership, votes and records.

    `silence_s`: who is not heard of for so long has stalled. `call` finds out whether a worker lives at an address.
    A `ledger` that is not empty makes it the coordinator that wrote it. The `book` is that of the samples, if leased.
    A run that is `resumed` goes on from a checkpoint. Checkpoints are made at the `desk`.
    """

    def __init__(
        self,
        workers: Sequence[int],
        *,
        silence_s: float,
        clock: Callable[[], float] = time.monotonic,
        call: Callable[[str], Awaitable[Sign]] = _silent,
        ledger: Ledger | None = None,
        book: LeaseBook | None = None,
        resumed: Resumption | None = None,
        grid: Grid = WHOLE,
    ) -> None:
        self.desk = Desk()
        self._resumed = resumed
        self.expected = frozenset(workers)
        self._book, self._grid = book, grid
        self._silence_s, self._clock, self._call, self._ledger = silence_s, clock, call, ledger
        self._roster: Roster | None = None
        self._seats: dict[int, Seat] = {}
        self._began_s = 0.0
        self._begun = asyncio.Event()
        self._change = asyncio.Event()
        self._reports = Reports(resumed.lines if resumed else {})
        self._departed = 0
        self._heard: dict[int, float] = {}
        self._polled = clock()
        self._gone: dict[int, Gone] = {}  # until the driver has seen to it, or the worker is back
        self._news: list[str] = []
        self._doing = 0  # calls in which entries are noted, one within another
        self._noted: list[Any] = []
        if ledger is not None:
            self._go_on(ledger)

    @property
    def members(self) -> Members:
        """Those in the run; before it begins, those who will be in it."""
        return Members(0, tuple(self.expected)) if self._roster is None else self._roster.members

    @property
    def contacts(self) -> dict[int, Contact]:
        """Where the members listen."""
        members = self.members
        return {
            worker: Contact(seat.incarnation, seat.entrant.address)
            for worker, seat in self._seats.items()
            if worker in members
        }

    # -- who is there ------------------------------------------------------------------------------------------------

    async def join(self, entrant: Entrant) -> Welcome:
        """Welcome the entrant once the run has begun, which it does when all are there. Raises `Refused`."""
        worker, seat = entrant.worker, self._seats.get(entrant.worker)
        if worker not in self.expected:
            raise Refused(f"worker {worker} is not expected in this run")
        if seat is None or seat.entrant != entrant:  # else its call is repeated, for the answer was lost
            if seat is not None and entrant.life < seat.entrant.life:
                raise Refused(f"life {entrant.life} of worker {worker} has been replaced by {seat.entrant.life}")
            if seat is not None and entrant.life == seat.entrant.life and not self._is_out(worker):
                raise Refused(f"worker {worker} has joined already")
            for other in self._seats.values():
                if other.entrant.stage == entrant.stage:
                    _require_equal(other.entrant, entrant)
            with self._at_once():
                self._take_in(entrant, 0 if seat is None else seat.incarnation + 1)
        await self._begun.wait()
        seat = self._seats.get(worker)
        if seat is None or seat.entrant != entrant:
            raise Refused(f"life {entrant.life} of worker {worker} was given up before the run began")
        return Welcome(seat.incarnation, seat.host, self._clock() - self._began_s, self.members, self.contacts)

    def begin(self) -> None:
        """Begin the run with whoever has joined; the others come as newcomers. Again: nothing."""
        if self._roster is None:
            now = self._clock()
            with self._at_once():
                self._note("begin", now)
                self._begin(now)

    async def suspect(self, worker: int, incarnation: int) -> None:
        """Somebody does not hear that incarnation of the worker any more: find out, and take it out if it is gone."""
        seat = self._seats.get(worker)
        if seat is None or seat.incarnation != incarnation or self._is_out(worker):
            return
        sign = await self._call(seat.entrant.address)
        if sign != "alive" and self._seats[worker] is seat and not self._is_out(worker):
            with self._at_once():
                self._take_out(worker, "crashed" if sign == "gone" else "stalled", suspected=sign == "silent")

    def remove(self, worker: int, life: int, reason: str) -> None:
        """That life of the worker is over for sure, and why: whoever waits for it is told."""
        seat = self._seats.get(worker)
        if seat is None or seat.entrant.life != life:
            return
        with self._at_once():
            if self._roster is None:
                self._note("stand", worker)
                del self._seats[worker]
            else:
                self._heard.pop(worker, None)
                self._write_last_record(worker, reason)
                self._roster.remove(worker)
                if worker in self._gone:
                    self._note("known", worker)
                    del self._gone[worker]

    def require_seat(self, worker: int, incarnation: int) -> None:
        """Raise `Refused` unless this is the incarnation of the worker that is in the run; note that it lives."""
        seat = self._seats.get(worker)
        if seat is not None and incarnation < seat.incarnation:
            raise Refused(f"incarnation {incarnation} of worker {worker} has been replaced by {seat.incarnation}")
        if seat is None or self._roster is None or worker not in self._roster.members:
            raise Refused(f"worker {worker} is not in the run")
        self._heard[worker] = self._clock()

    # -- what members ask --------------------------------------------------------------------------------------------

    async def vote(self, ballot: Ballot) -> Decision:
        """Return what the ballot's round came to, when it is decided."""
        assert self._roster is not None
        answer: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()

        def decided(decision: Decision) -> None:
            if not answer.done():
                answer.set_result(decision)

        with self._at_once():
            self._roster.vote(ballot, decided)
        return await answer

    def lease(self, request: Request) -> Grant:
        """Lease samples to a member. Raises `Refused` where none are leased."""
        if self._book is None:
            raise Refused("in this run each worker has samples of its own")
        if request.wanted % self._book.batch_size:
            raise Refused(f"leases are multiples of the batch size, {self._book.batch_size} samples")
        with self._at_once():
            self._note("lease", request)
            return self._book.lease(request)

    async def watch(self, epoch: int) -> Members:
        """Return the members as soon as there is an epoch after this one; after `WATCH_S` the same ones again."""
        if self.members.epoch <= epoch:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._change.wait(), WATCH_S)
        return self.members

    def report(self, worker: int, first: int, records: Sequence[Fields]) -> None:
        """Take a worker's records, its `first`-th and following; those taken before are not taken twice.

        A report without records is a sign of life. Raises `Refused` for what is no record.
        """
        checked = [_checked_record(worker, fields) for fields in self._reports.unknown(worker, first, records)]
        if checked:
            with self._at_once():
                self._note("report", worker, [plain(record) for record in checked])
                self._take(worker, checked)

    def leave(self, worker: int, incarnation: int, first: int, records: Sequence[Fields], finished: bool) -> None:
        """A worker's last report, when it has `finished` or must go. It is no member any more; again: nothing."""
        if self._is_out(worker) and self._seats[worker].incarnation == incarnation:
            return  # the answer was lost
        self.require_seat(worker, incarnation)
        assert self._roster is not None
        with self._at_once():
            self.report(worker, first, records)
            self._heard.pop(worker, None)
            self._roster.remove(worker, finished=finished)

    @property
    def lines_before(self) -> dict[int, int]:
        """How many lines of the journal each worker had before its present life; of one that is gone, all."""
        return {
            worker: lines if self._is_out(worker) else self._reports.lines_before.get(worker, 0)
            for worker, lines in self._reports.lines.items()
        }

    async def begun(self) -> None:
        """Return when the run has begun."""
        await self._begun.wait()

    async def journalled(self, lines: Mapping[int, int]) -> None:
        """Return when the driver has so many lines of the journal of each worker."""
        await self._reports.journalled(lines)

    def tell(self, news: str) -> None:
        """Have the driver hear this."""
        self._news.append(news)

    # -- what the driver asks ----------------------------------------------------------------------------------------

    def poll(self, taken: int) -> Poll:
        """Return what is new to a driver that has `taken` so many records, and who had to be taken out of the run.

        The latter is said until `remove` answers it.
        """
        now = self._clock()
        if now - self._polled > self._silence_s / 2:  # it was us who slept, or the driver: the silence proves nothing
            self._heard = dict.fromkeys(self._heard, now)
        self._polled = now
        with self._at_once():
            for worker in [worker for worker, heard in self._heard.items() if now - heard > self._silence_s]:
                self._take_out(worker, "stalled", suspected=True)
            if taken > self._reports.taken:
                self._note("taken", taken)
                self._reports.forget(taken)
        if self._ledger is not None and self._ledger.is_long:
            self._ledger.begin_anew([("state", self._state())])
        news, self._news = self._news, []
        members = [] if self._roster is None else list(self._roster.members)
        return {
            "records": list(self._reports.held),
            "joined": len(self._seats),
            "begun": self._roster is not None,
            "lives": [(worker, seat.entrant.life) for worker, seat in self._seats.items()],
            "members": members,
            "gone": list(self._gone.values()),
            "news": news,
        }

    def status(self, run: str) -> Status:
        """Return the run's status as of now, under this name."""
        now, members = self._clock(), self.members
        begun = self._roster is not None
        attendance = Attendance(
            epoch=members.epoch,
            members=members.ids if begun else (),
            guests=tuple(guest for guest in members.guests if guest not in members.party()),
            nodes={worker: seat.entrant.address.rpartition(":")[0] for worker, seat in self._seats.items()},
            heard_s={worker: now - heard for worker, heard in self._heard.items()},
            held_back=len(self._reports.held),
        )
        return self._reports.tally.status(run, attendance, now - self._began_s if begun else 0.0)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _take_in(self, entrant: Entrant, incarnation: int) -> None:
        worker = entrant.worker
        host = None if self._roster is None else self._host_for(worker)  # itself: its row lets it in
        if self._roster is not None:
            self._write_last_record(worker, "replaced")
            self._roster.remove(worker)  # it is here again: nobody need wait until its death is found out
        self._note("seat", dataclasses.astuple(entrant), incarnation, host)
        self._sit_down(Seat(entrant, incarnation, host))
        if self._roster is not None:
            self._heard[worker] = self._clock()
            self._roster.join(worker, alone=host == worker)
        elif self._seats.keys() == self.expected:
            self.begin()

    def _sit_down(self, seat: Seat) -> None:
        worker = seat.entrant.worker
        self._seats[worker] = seat
        self._gone.pop(worker, None)
        self._reports.begin_life(worker)

    def _host_for(self, newcomer: int) -> int:
        """Return the member that had best let the newcomer in, itself if its row must; raises `Refused`."""
        hosts = {worker: seat.host for worker, seat in self._seats.items() if seat.host is not None}
        host = host_for(newcomer, self.members, hosts, group=self._grid.column(newcomer, len(self.expected)))
        if host is not None:
            return host
        if not self._grid.mates(newcomer) & set(self.members):
            raise Refused("nobody is left who could let a newcomer in")
        return newcomer

    def _is_out(self, worker: int) -> bool:
        return self._roster is not None and worker not in self._roster.members

    def _take_out(self, worker: int, reason: str, suspected: bool) -> None:
        assert self._roster is not None
        self._heard.pop(worker, None)
        gone = Gone(worker, self._seats[worker].entrant.life, reason)
        self._note("gone", *gone)
        self._gone[worker] = gone
        self._write_last_record(worker, reason)
        self._roster.remove(worker, suspected=suspected)

    def _begin(self, began_s: float) -> None:
        self._roster = self._new_roster(absent=self.expected - self._seats.keys())
        self._began_s = began_s - (self._resumed.time_s if self._resumed else 0.0)
        self._heard = dict.fromkeys(self._seats, self._clock())
        self._begun.set()

    def _new_roster(self, absent: Collection[int] = ()) -> Roster:
        return Roster(tuple(sorted(self.expected)), self._changed, absent, self._note_roster)

    def _take(self, worker: int, records: Sequence[Record]) -> None:
        self._reports.take(worker, records)
        if self._book is not None:
            for record in records:
                self._book.saw(record)

    def _write_last_record(self, worker: int, reason: str) -> None:
        """Write the last record of a worker that cannot."""
        last = self._reports.last_record(worker, self._clock() - self._began_s, reason)
        if last is not None:
            self._note("last", worker, plain(last))
            self._reports.keep(worker, [last])

    def _changed(self, members: Members) -> None:
        if self._book is not None:
            self._book.changed(members)
        for worker in members.departed[self._departed :]:
            self.desk.left(worker, finished=worker in members.finished)
        self._departed = len(members.departed)
        self._change.set()
        self._change = asyncio.Event()

    # -- the ledger --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _at_once(self) -> Iterator[None]:
        """Have all that is noted within in the ledger at once: whenever we die, it has been done or it has not."""
        self._doing += 1
        try:
            yield
        finally:
            self._doing -= 1
            if self._noted and not self._doing and self._ledger is not None:
                self._ledger.append(self._noted)
                self._noted = []  # if the disk is full they come with the next ones

    def _note(self, *entry: Any) -> None:
        if self._ledger is not None:
            self._noted.append(entry)

    def _note_roster(self, entry: Entry) -> None:
        self._note("roster", entry)

    def _go_on(self, ledger: Ledger) -> None:
        for entry in chain.from_iterable(ledger.entries()):
            match entry:
                case ("state", state):
                    self._restore(state)
                case ("seat", fields, incarnation, host):
                    self._sit_down(Seat(Entrant(*fields), incarnation, host))
                case ("stand", worker):
                    del self._seats[worker]
                case ("begin", began_s):
                    self._begin(began_s)
                case ("gone", worker, life, reason):
                    self._gone[worker] = Gone(worker, life, reason)
                case ("known", worker):
                    del self._gone[worker]
                case ("roster", told) if self._roster is not None:
                    self._roster.replay([told])
                    self._changed(self._roster.members)
                case ("report", worker, records):
                    self._take(worker, [record_from(fields) for fields in records])
                case ("last", worker, fields):
                    self._reports.keep(worker, [record_from(fields)])
                case ("lease", request) if self._book is not None:
                    self._book.lease(Request(*request))
                case ("taken", taken):
                    self._reports.forget(taken)
                case _:
                    raise ValueError(f"a ledger has no entry such as {entry!r}")
        if self._roster is not None:
            self._heard = dict.fromkeys(self._roster.members, self._clock())

    def _state(self) -> Fields:
        """Return plain values that say as much as all entries of the ledger so far."""
        return {
            "seats": [(dataclasses.astuple(entrant), *rest) for entrant, *rest in self._seats.values()],
            "gone": list(self._gone.values()),
            "began_s": self._began_s,
            "roster": None if self._roster is None else self._roster.state(),
            "book": None if self._book is None else self._book.whole_state(),
            "reports": self._reports.state(),
        }

    def _restore(self, state: Fields) -> None:
        for fields, incarnation, host in state["seats"]:
            seat = Seat(Entrant(*fields), incarnation, host)
            self._seats[seat.entrant.worker] = seat
        self._gone = {worker: Gone(worker, life, reason) for worker, life, reason in state["gone"]}
        self._began_s = state["began_s"]
        self._reports.restore(state["reports"])
        if self._book is not None:
            self._book.restore_whole(state["book"])
        if state["roster"] is not None:
            self._roster = self._new_roster()
            self._roster.restore(state["roster"])
            self._begun.set()
            self._changed(self._roster.members)


def _require_equal(first: Entrant, entrant: Entrant) -> None:
    if entrant.parameters != first.parameters:
        raise Refused(
            f"worker {entrant.worker} has a model of {entrant.parameters} parameters, worker {first.worker} one of "
            f"{first.parameters}; all workers must build the same model: is the task's code the same everywhere?"
        )
    if entrant.digest != first.digest:
        raise Refused(
            f"workers {first.worker} and {entrant.worker} start from different weights; task.model() must draw them "
            "from torch's global generator alone, a script of your own must seed it before it makes its model, and all "
            "machines need the same version of torch"
        )


def _checked_record(worker: int, fields: Fields) -> Record:
    try:
        kind = record_from(fields).kind
        record: Record = _TYPES[kind].validate_python({name: fields[name] for name in fields if name != "kind"})
    except (ConfigError, TypeError, ValidationError) as error:
        raise Refused(f"worker {worker} reported what is no record: {error}") from error
    values = plain(record).values()
    if record.worker != worker or any(isinstance(value, int) and value < 0 for value in values):
        raise Refused(f"worker {worker} reported what cannot be a record of its own: {record.to_json()}")
    return record


_TYPES: dict[str, TypeAdapter[Any]] = {kind: TypeAdapter(cls) for kind, cls in KINDS.items()}
