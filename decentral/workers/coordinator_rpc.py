"""The coordinator over gRPC: `CoordinatorServer`, and `CoordinatorClient` on a worker's side.

Requests and replies are msgpack maps. Who has joined says in every request which incarnation of which worker it is.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgpack
from pydantic import BaseModel, ValidationError

from decentral.checkpoint import Abandoned, Cut, Description, File, Order
from decentral.errors import RunError
from decentral.journal import Record
from decentral.leases import Grant, Range, Request
from decentral.members import Ballot, Decision, Members
from decentral.workers import rpc
from decentral.workers.coordinator import WATCH_S, Coordinator, Entrant, Refused, Welcome
from decentral.workers.reports import Fields
from decentral.workers.transport import Contact
from decentral.workers.tuned import grpc

M = TypeVar("M", bound=BaseModel)

SERVICE = "decentral.Coordinator"
MAX_REQUEST_BYTES = 1 << 26
GRACE_S = 15.0
"""Seconds on top of the network's own that an answer may take before its caller gives up."""
ORDER_S = 600.0
"""Seconds that a worker waits at the desk for checkpoints before it asks again."""
FIRST_RETRY_S = 0.05
LAST_RETRY_S = 0.2
"""An absent coordinator is called again after so many seconds: the first time, and the most."""
TELL_AFTER_S = 5.0
"""Whoever has called in vain for so long says so."""
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""What calls come to that no coordinator answers: it is not there, or went down in the midst of one."""
_DENIED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
log = logging.getLogger(__name__)


class CoordinatorServer:
    """Answers the workers' calls from a `Coordinator`. Whatever a request holds, the server goes on."""

    def __init__(self, coordinator: Coordinator, keys: rpc.Keys) -> None:
        self._coordinator = coordinator
        self._keys = keys
        self._server: Any = None

    async def start(self, host: str, port: int) -> str:
        """Listen on `host:port` (0: a free one); return the address. Raises `RunError` when the port is in use."""
        seated = {"vote": self._vote, "watch": self._watch, "report": self._report, "suspect": self._suspect}
        seated |= {"lease": self._lease, "order": self._order, "stand": self._stand, "describe": self._describe}
        seated |= {"wrote": self._wrote, "failed": self._failed}
        calls = {name: self._of_members(call) for name, call in seated.items()}
        methods = {name: _method(call) for name, call in {**calls, "join": self._join, "leave": self._leave}.items()}
        self._server, address = await rpc.serve(
            SERVICE, methods, host=host, port=port, keys=self._keys, max_message_bytes=MAX_REQUEST_BYTES
        )
        return address

    async def stop(self, grace_s: float | None = None) -> None:
        """Take no calls any more; those that are being answered have so many seconds yet (None: none)."""
        await self._server.stop(grace=grace_s)

    def _of_members(self, call: Callable[[int, Fields], Awaitable[Fields]]) -> Callable[[Fields], Awaitable[Fields]]:
        async def answer(request: Fields) -> Fields:
            worker, incarnation = _seat(request)
            self._coordinator.require_seat(worker, incarnation)
            return await call(worker, request)

        return answer

    async def _join(self, request: Fields) -> Fields:
        entrant = _read(Entrant, request)
        try:
            welcome = await self._coordinator.join(entrant)
        except Refused as error:
            log.warning("worker %d was turned away: %s", entrant.worker, error)
            raise
        return {**welcome._asdict(), "members": welcome.members.plain(), "contacts": list(welcome.contacts.items())}

    async def _vote(self, worker: int, request: Fields) -> Fields:
        ballot = _read(Ballot, {**request, "worker": worker})
        decision = await self._coordinator.vote(ballot)
        return {"outcome": decision.outcome, "members": decision.members.plain(), "now": decision.now.plain()}

    async def _watch(self, worker: int, request: Fields) -> Fields:
        members = await self._coordinator.watch(_whole(request, "since") - 1)
        return {"members": members.plain(), "contacts": list(self._coordinator.contacts.items())}

    async def _report(self, worker: int, request: Fields) -> Fields:
        self._coordinator.report(worker, *_batch(request))
        return {}

    async def _lease(self, worker: int, request: Fields) -> Fields:
        wish = {name: _whole(request, name) for name in ("known", "wanted", "step")}
        return self._coordinator.lease(Request(worker, **wish))._asdict()

    async def _suspect(self, worker: int, request: Fields) -> Fields:
        await self._coordinator.suspect(_whole(request, "whom"), _whole(request, "whose"))
        return {}

    # -- checkpoints -------------------------------------------------------------------------------------------------

    async def _order(self, worker: int, request: Fields) -> Fields:
        return {"order": await self._coordinator.desk.order(worker, _text(request, "known"))}

    async def _stand(self, worker: int, request: Fields) -> Fields:
        rounds = request.get("rounds")
        if not isinstance(rounds, dict) or not all(type(number) is int for number in rounds.values()):
            raise Refused("'rounds' must be a map of whole numbers")
        return {"cut": await self._coordinator.desk.stand(worker, _text(request, "folder"), rounds)}

    async def _describe(self, worker: int, request: Fields) -> Fields:
        description = _model(Description, request, "description")
        if description.worker != worker:
            raise Refused(f"worker {worker} described worker {description.worker}")
        return {"share": await self._coordinator.desk.describe(worker, _text(request, "folder"), description)}

    async def _wrote(self, worker: int, request: Fields) -> Fields:
        await self._coordinator.desk.wrote(worker, _text(request, "folder"), _model(File, request, "file"))
        return {}

    async def _failed(self, worker: int, request: Fields) -> Fields:
        await self._coordinator.desk.failed(worker, _text(request, "folder"), _text(request, "reason"))
        return {}

    async def _leave(self, request: Fields) -> Fields:
        finished = request.pop("finished", None)
        if not isinstance(finished, bool):
            raise Refused("'finished' must be true or false")
        self._coordinator.leave(*_seat(request), *_batch(request), finished)
        return {}


def _method(call: Callable[[Fields], Awaitable[Fields]]) -> Any:
    async def answer(request: bytes, context: Any) -> bytes:
        try:
            reply: bytes = msgpack.packb(await call(_unpack(request)))
            return reply
        except Refused as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            raise
        except Abandoned as error:
            await context.abort(grpc.StatusCode.ABORTED, str(error))
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


def _text(fields: Fields, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise Refused(f"'{name}' must be a text")
    return value


def _model(cls: type[M], fields: Fields, name: str) -> M:
    try:
        return cls.model_validate(fields.get(name))
    except ValidationError as error:
        raise Refused(f"'{name}' is not what it should be: {error.errors()[0]['msg']}") from error


def _seat(fields: Fields) -> tuple[int, int]:
    """Take out of a request whose it is: worker and incarnation."""
    seat = _whole(fields, "worker"), _whole(fields, "incarnation")
    del fields["worker"], fields["incarnation"]
    return seat


def _batch(fields: Fields) -> tuple[int, list[Fields]]:
    records = fields.get("records")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise Refused("'records' must be a list of maps")
    return _whole(fields, "first"), records


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


def _contacts(plain: Sequence[Any]) -> dict[int, Contact]:
    return {worker: Contact(*contact) for worker, contact in plain}


class Dismissed(RunError):
    """The coordinator grants us nothing: we have been declared dead, or another life has taken our place."""


class CoordinatorClient:
    """A worker's line to the coordinator. Every call ends in an answer or, within a bounded time, in `RunError`.

    A coordinator that cannot be reached is called again until the call's time is over, a member's call for `away_s`
    seconds at most, for it may be on its way back; so every call may be made twice. `latency_s` is that of an emulated
    link: a member's call takes it each way.
    """

    def __init__(
        self, address: str, worker: int, keys: rpc.Keys, latency_s: float = 0.0, away_s: float = math.inf
    ) -> None:
        self._address, self._worker, self._latency_s, self._away_s = address, worker, latency_s, away_s
        self._metadata = keys.metadata
        self._channel = rpc.dial(address, keys)
        self._incarnation = 0

    async def join(self, entrant: Entrant, timeout_s: float) -> Welcome:
        """Return who is there once the run begins, or has begun. Raises `RunError`, also when refused."""
        reply = await self._call("join", dataclasses.asdict(entrant), timeout_s)
        reply |= {"members": Members.of(reply["members"]), "contacts": _contacts(reply["contacts"])}
        welcome = Welcome(**reply)
        self._incarnation = welcome.incarnation
        return welcome

    async def vote(self, ballot: Ballot, timeout_s: float) -> Decision:
        """Return the decision on the ballot's round."""
        reply = await self.ask("vote", dataclasses.asdict(ballot), timeout_s)
        return Decision(reply["outcome"], Members.of(reply["members"]), Members.of(reply["now"]))

    async def watch(self, epoch: int) -> tuple[Members, dict[int, Contact]]:
        """Return members and contacts once there is an epoch after this one, or after a while the same ones."""
        reply = await self.ask("watch", {"since": epoch + 1}, WATCH_S + GRACE_S)
        return Members.of(reply["members"]), _contacts(reply["contacts"])

    async def report(self, first: int, records: Sequence[Record]) -> None:
        """Hand in this worker's records, its `first`-th and following."""
        await self.ask("report", _reported(first, records), GRACE_S)

    async def lease(self, request: Request, timeout_s: float) -> Grant:
        """Return what is leased to this worker."""
        wish = {"known": request.known, "wanted": request.wanted, "step": request.step}
        reply = await self.ask("lease", wish, timeout_s)
        return Grant(tuple(Range(start, stop) for start, stop in reply["ranges"]), reply["last_step"])

    async def suspect(self, worker: int, incarnation: int) -> None:
        """Have the coordinator find out whether that incarnation of another worker still lives."""
        await self.ask("suspect", {"whom": worker, "whose": incarnation}, GRACE_S)

    async def leave(self, first: int, records: Sequence[Record], finished: bool, timeout_s: float) -> None:
        """Hand in this worker's last records and leave the run."""
        await self.ask("leave", {**_reported(first, records), "finished": finished}, timeout_s)

    async def close(self) -> None:
        await self._channel.close()

    async def ask(self, method: str, fields: Fields, timeout_s: float) -> Fields:
        """Return the answer to a member's call. Raises `RunError`, and `Abandoned` from the desk for checkpoints."""
        await asyncio.sleep(self._latency_s)
        whole = {**fields, "worker": self._worker, "incarnation": self._incarnation}
        answer = await self._call(method, whole, timeout_s, self._away_s)
        await asyncio.sleep(self._latency_s)
        return answer

    async def _call(self, method: str, fields: Fields, timeout_s: float, away_s: float = math.inf) -> Fields:
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + timeout_s, FIRST_RETRY_S
        away_since, is_told = math.inf, False
        request = msgpack.packb(fields)
        while True:
            call = self._channel.unary_unary(f"/{SERVICE}/{method}")
            try:
                reply = await call(request, metadata=self._metadata, timeout=max(0.0, deadline - loop.time()))
                answer: Fields = msgpack.unpackb(reply)
                return answer
            except grpc.aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                    raise Dismissed(error.details()) from None
                if error.code() == grpc.StatusCode.ABORTED:
                    raise Abandoned(error.details()) from None
                now, who = loop.time(), f"worker {self._worker}: the coordinator at {self._address}"
                if error.code() in _DENIED:
                    raise RunError(f"{who} turned '{method}' away: {error.details()}") from None
                away_since = min(away_since, now)
                waits_s = min(deadline - now, away_since + away_s - now)
                if error.code() not in _AWAY or pause > waits_s:
                    within = min(timeout_s, away_s)
                    raise RunError(f"{who} did not answer '{method}' within {within:g} s: {error.details()}") from None
                if not is_told and now - away_since > TELL_AFTER_S:
                    is_told = True
                    log.warning("%s cannot be reached; calling for %.0f s more: %s", who, waits_s, error.details())
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_RETRY_S)


def _reported(first: int, records: Sequence[Record]) -> Fields:
    return {"first": first, "records": [{"kind": record.kind, **dataclasses.asdict(record)} for record in records]}


class RemoteDesk:
    """The desk where checkpoints are agreed on (`checkpoint.DeskLine`), over a worker's line to the coordinator.

    `hand_in` reports the worker's records: those before a checkpoint are there before it is said to be written, or a
    death in between would leave the coordinator waiting for them for ever.
    """

    def __init__(self, client: CoordinatorClient, hand_in: Callable[[], Awaitable[None]]) -> None:
        self._client, self._hand_in = client, hand_in

    async def order(self, worker: int, known: str) -> Order:
        return Order(*(await self._client.ask("order", {"known": known}, ORDER_S))["order"])

    async def stand(self, worker: int, folder: str, rounds: Mapping[str, int]) -> Cut:
        reply = await self._client.ask("stand", {"folder": folder, "rounds": dict(rounds)}, ORDER_S)
        return Cut(*reply["cut"])

    async def describe(self, worker: int, folder: str, description: Description) -> tuple[str, ...]:
        fields = {"folder": folder, "description": description.model_dump(mode="json")}
        return tuple((await self._client.ask("describe", fields, ORDER_S))["share"])

    async def wrote(self, worker: int, folder: str, file: File) -> None:
        await self._hand_in()
        await self._client.ask("wrote", {"folder": folder, "file": file.model_dump(mode="json")}, GRACE_S)

    async def failed(self, worker: int, folder: str, reason: str) -> None:
        await self._client.ask("failed", {"folder": folder, "reason": reason}, GRACE_S)
