"""The coordinator: who is in the run, what rounds came to, and where records go. Tensors never pass through it.

`Coordinator` holds the state and does no I/O; `CoordinatorServer` is its gRPC side, spoken to by `CoordinatorClient`;
`CoordinatorActor` is what Ray hosts and the driver talks to. Requests and replies are msgpack maps.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import grpc
import grpc.aio
import msgpack

from decentral.errors import ConfigError, RunError
from decentral.journal import Record, record_from
from decentral.members import Ballot, Decision, Members, Roster
from decentral.workers import rpc

SERVICE = "decentral.Coordinator"
MAX_REQUEST_BYTES = 1 << 26
WATCH_S = 10.0
"""A watch that has nothing to tell is answered after so many seconds, and asked again."""
GRACE_S = 15.0
"""Seconds on top of the network's own that an answer may take before its caller gives up."""

Fields = dict[str, Any]


class Refused(Exception):
    """A request that cannot be granted; the message is for the one who asked."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entrant:
    """A worker that wants to join: where it listens, and the weights it starts from."""

    worker: int
    incarnation: int
    address: str
    digest: int
    parameters: int


class Poll(TypedDict):
    """What the driver asks for again and again."""

    records: list[Fields]
    joined: int
    silent: list[int]


class Coordinator:
    """One run's membership, votes and records. `silence_s`: who is not heard of for so long has stalled."""

    def __init__(
        self, workers: Sequence[int], *, silence_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._roster = Roster(tuple(workers), self._changed)
        self._expected = frozenset(workers)
        self._silence_s, self._clock = silence_s, clock
        self._entrants: dict[int, Entrant] = {}
        self._complete = asyncio.Event()
        self._change = asyncio.Event()
        self._records: list[Fields] = []
        self._reported: dict[int, int] = {}
        self._heard: dict[int, float] = {}
        self._polled = clock()

    @property
    def members(self) -> Members:
        return self._roster.members

    async def join(self, entrant: Entrant) -> list[Entrant]:
        """Return all entrants once every expected worker is there. Raises `Refused`."""
        if entrant.worker not in self._expected or entrant.worker not in self.members:
            raise Refused(f"worker {entrant.worker} is not expected in this run")
        if entrant.worker in self._entrants:
            raise Refused(f"worker {entrant.worker} has joined already")
        for first in self._entrants.values():
            _require_equal(first, entrant)
        self._entrants[entrant.worker] = entrant
        if self._entrants.keys() == self._expected:
            self._heard = dict.fromkeys(self._expected, self._clock())
            self._complete.set()
        await self._complete.wait()
        return list(self._entrants.values())

    async def vote(self, ballot: Ballot) -> Decision:
        """Return what the ballot's round came to, when it is decided."""
        self._hear(ballot.worker)
        answer: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()

        def decided(decision: Decision) -> None:
            if not answer.done():
                answer.set_result(decision)

        self._roster.vote(ballot, decided)
        return await answer

    async def watch(self, epoch: int) -> Members:
        """Return the members as soon as there is an epoch after this one; after `WATCH_S` the same ones again."""
        if self.members.epoch <= epoch:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._change.wait(), WATCH_S)
        return self.members

    def report(self, worker: int, first: int, records: Sequence[Fields]) -> None:
        """Take a worker's records, its `first`-th and following; those taken before are not taken twice.

        A report without records is a sign of life. Raises `Refused` for who has left, and for what is no record.
        """
        if worker not in self.members:
            raise Refused(f"worker {worker} is not in the run")
        self._hear(worker)
        known = self._reported.get(worker, 0)
        fresh = [_checked_record(worker, fields) for fields in records[max(0, known - first) :]]
        self._reported[worker] = max(known, first + len(records))
        self._records += fresh

    def leave(self, worker: int, first: int, records: Sequence[Fields]) -> None:
        """A worker's last report. It is no member any more."""
        self.report(worker, first, records)
        self._heard.pop(worker, None)
        self._roster.remove(worker, finished=True)

    def remove(self, worker: int) -> None:
        """The worker is dead: whoever waits for it is told."""
        self._heard.pop(worker, None)
        self._roster.remove(worker)

    def drain_records(self) -> list[Fields]:
        """Return the records that came since the last call."""
        records, self._records = self._records, []
        return records

    def poll(self) -> Poll:
        """Return new records, how many have joined, and the members that have stalled, who are members no longer."""
        now = self._clock()
        if now - self._polled > self._silence_s / 2:  # it was us who slept, or the driver: the silence proves nothing
            self._heard = dict.fromkeys(self._heard, now)
        self._polled = now
        silent = [worker for worker, heard in self._heard.items() if now - heard > self._silence_s]
        for worker in silent:
            self.remove(worker)
        return {"records": self.drain_records(), "joined": len(self._entrants), "silent": silent}

    def _hear(self, worker: int) -> None:
        if worker in self._heard:
            self._heard[worker] = self._clock()

    def _changed(self, _members: Members) -> None:
        self._change.set()
        self._change = asyncio.Event()


def _require_equal(first: Entrant, entrant: Entrant) -> None:
    if entrant.parameters != first.parameters:
        raise Refused(
            f"worker {entrant.worker} has a model of {entrant.parameters} parameters, worker {first.worker} one of "
            f"{first.parameters}; all workers must build the same model: is the task's code the same everywhere?"
        )
    if entrant.digest != first.digest:
        raise Refused(
            f"workers {first.worker} and {entrant.worker} start from different weights; task.model() must draw them "
            "from torch's global generator alone, and all machines need the same version of torch"
        )


def _checked_record(worker: int, fields: Fields) -> Fields:
    try:
        record = record_from(fields)
    except (ConfigError, TypeError) as error:
        raise Refused(f"worker {worker} reported what is no record: {error}") from error
    if record.worker != worker:
        raise Refused(f"worker {worker} reported a record of worker {record.worker}")
    return fields


# -- gRPC --------------------------------------------------------------------------------------------------------------


class CoordinatorServer:
    """Answers the workers' calls from a `Coordinator`. Whatever a request holds, the server goes on."""

    def __init__(self, coordinator: Coordinator, keys: rpc.Keys) -> None:
        self._coordinator = coordinator
        self._keys = keys
        self._server: Any = None

    async def start(self, host: str, port: int) -> str:
        """Listen on `host:port` (0: a free one); return the address. Raises `RunError` when the port is in use."""
        calls = {"join": self._join, "vote": self._vote, "watch": self._watch, "report": self._report}
        methods = {name: _method(call) for name, call in {**calls, "leave": self._leave}.items()}
        self._server, address = await rpc.serve(
            SERVICE, methods, host=host, port=port, keys=self._keys, max_message_bytes=MAX_REQUEST_BYTES
        )
        return address

    async def stop(self) -> None:
        await self._server.stop(grace=None)

    async def _join(self, request: Fields) -> Fields:
        entrants = await self._coordinator.join(_read(Entrant, request))
        entries = [dataclasses.asdict(entrant) for entrant in entrants]
        return {"entrants": entries, "members": _plain(self._coordinator.members)}

    async def _vote(self, request: Fields) -> Fields:
        decision = await self._coordinator.vote(_read(Ballot, request))
        return {"outcome": decision.outcome, "members": _plain(decision.members), "now": _plain(decision.now)}

    async def _watch(self, request: Fields) -> Fields:
        return {"members": _plain(await self._coordinator.watch(_whole(request, "epoch")))}

    async def _report(self, request: Fields) -> Fields:
        self._coordinator.report(*_batch(request))
        return {}

    async def _leave(self, request: Fields) -> Fields:
        self._coordinator.leave(*_batch(request))
        return {}


def _method(call: Callable[[Fields], Awaitable[Fields]]) -> Any:
    async def answer(request: bytes, context: Any) -> bytes:
        try:
            reply: bytes = msgpack.packb(await call(_unpack(request)))
            return reply
        except Refused as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            raise

    return grpc.unary_unary_rpc_method_handler(answer)


def _unpack(data: bytes) -> Fields:
    try:
        fields = msgpack.unpackb(data, strict_map_key=True)
    except Exception as error:
        raise Refused(f"the request is not msgpack: {error}") from error
    if not isinstance(fields, dict):
        raise Refused("the request is not a map")
    return fields


def _whole(fields: Fields, name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or value < 0:
        raise Refused(f"'{name}' must be a whole number of at least 0")
    return value


def _batch(fields: Fields) -> tuple[int, int, list[Fields]]:
    records = fields.get("records")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise Refused("'records' must be a list of maps")
    return _whole(fields, "worker"), _whole(fields, "first"), records


_KINDS = {"int": (int,), "str": (str,), "int | None": (int, type(None)), "tuple[int, ...]": (list,)}


def _read(cls: type[Any], fields: Fields) -> Any:
    """Return the dataclass of these fields; raises `Refused` if names or types are not its own."""
    wanted = {field.name: _KINDS[str(field.type)] for field in dataclasses.fields(cls)}
    if fields.keys() != wanted.keys() or any(type(fields[name]) not in kinds for name, kinds in wanted.items()):
        raise Refused(f"the request must have the fields {', '.join(wanted)}, each of its type")
    tuples = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    if any(type(item) is not int for items in tuples.values() for item in items):
        raise Refused(f"{' and '.join(tuples)} must hold whole numbers alone")
    return cls(**{**fields, **tuples})


def _plain(members: Members) -> list[Any]:
    guests = [[worker, sorted(channels)] for worker, channels in members.guests.items()]
    admitted = [[channel, list(workers)] for channel, workers in members.admitted.items()]
    return [members.epoch, list(members.ids), list(members.finished), list(members.departed), guests, admitted]


def _members(plain: Sequence[Any]) -> Members:
    epoch, ids, finished, departed, guests, admitted = plain
    return Members(
        epoch,
        tuple(ids),
        tuple(finished),
        tuple(departed),
        {worker: frozenset(channels) for worker, channels in guests},
        {channel: tuple(workers) for channel, workers in admitted},
    )


class CoordinatorClient:
    """A worker's line to the coordinator. Every call ends in an answer or, within a bounded time, in `RunError`."""

    def __init__(self, address: str, worker: int, keys: rpc.Keys) -> None:
        self._address, self._worker = address, worker
        self._metadata = keys.metadata
        self._channel = rpc.dial(address, keys)

    async def join(self, entrant: Entrant, timeout_s: float) -> tuple[Members, list[Entrant]]:
        """Return the members and all entrants once everybody is there. Raises `RunError`, also when refused."""
        reply = await self._call("join", dataclasses.asdict(entrant), timeout_s)
        return _members(reply["members"]), [Entrant(**fields) for fields in reply["entrants"]]

    async def vote(self, ballot: Ballot, timeout_s: float) -> Decision:
        """Return the decision on the ballot's round."""
        reply = await self._call("vote", dataclasses.asdict(ballot), timeout_s)
        return Decision(reply["outcome"], _members(reply["members"]), _members(reply["now"]))

    async def watch(self, epoch: int) -> Members:
        """Return the members once the epoch has advanced, or after a while the same ones."""
        return _members((await self._call("watch", {"epoch": epoch}, WATCH_S + GRACE_S))["members"])

    async def report(self, first: int, records: Sequence[Record]) -> None:
        """Hand in this worker's records, its `first`-th and following."""
        await self._call("report", self._batch(first, records), GRACE_S)

    async def leave(self, first: int, records: Sequence[Record]) -> None:
        """Hand in this worker's last records and leave the run."""
        await self._call("leave", self._batch(first, records), GRACE_S)

    async def close(self) -> None:
        await self._channel.close()

    def _batch(self, first: int, records: Sequence[Record]) -> Fields:
        plain = [{"kind": record.kind, **dataclasses.asdict(record)} for record in records]
        return {"worker": self._worker, "first": first, "records": plain}

    async def _call(self, method: str, fields: Fields, timeout_s: float) -> Fields:
        call = self._channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            reply = await call(msgpack.packb(fields), metadata=self._metadata, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                raise RunError(error.details()) from None
            raise RunError(
                f"worker {self._worker}: the coordinator at {self._address} did not answer '{method}': "
                f"{error.details()}"
            ) from None
        answer: Fields = msgpack.unpackb(reply)
        return answer


# -- Ray ---------------------------------------------------------------------------------------------------------------


class CoordinatorActor:
    """The coordinator as the driver's Ray actor."""

    def __init__(self, workers: Sequence[int], secret: str, certificates: Path | None, silence_s: float) -> None:
        self._workers, self._silence_s = workers, silence_s
        self._secret, self._certificates = secret, certificates
        self._coordinator: Coordinator | None = None

    async def start(self, port: int) -> str:
        """Listen on this machine's `port`; return the address. Raises `ConfigError`, and `RunError`: a port in use."""
        keys = rpc.Keys.here(self._secret, self._certificates)
        self._coordinator = Coordinator(self._workers, silence_s=self._silence_s)
        server = CoordinatorServer(self._coordinator, keys)
        return await server.start(rpc.host_here(), port)

    async def remove(self, worker: int) -> None:
        """The worker is dead."""
        self._started().remove(worker)

    async def poll(self) -> Poll:
        """Return what is new."""
        return self._started().poll()

    def _started(self) -> Coordinator:
        assert self._coordinator is not None
        return self._coordinator
