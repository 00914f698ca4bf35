"""The desk at which a run's workers meet for a checkpoint: no I/O, and one checkpoint at a time.

    ordered     all members say which rounds they have settled; the desk answers after which one they take their states
    described   all say what they hold; the desk answers who writes what
    written     all have written their share: the checkpoint may be committed

Of a checkpoint at which the workers part nothing is written: each leaves with the state that it has described.

Whatever goes wrong on the way (a worker that leaves, a share that cannot be written, the caller's deadline), the
checkpoint is abandoned: whoever waits at the desk is told so, and training goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from decentral.checkpoint.manifest import Description, File
from decentral.checkpoint.plan import Shares, plan, uneven

T = TypeVar("T")
R = TypeVar("R")


class Abandoned(Exception):
    """A checkpoint that will not be; the message says why."""


class Uneven(Abandoned):
    """Some took their state a round later than others: another attempt will look further ahead."""


class Cut(NamedTuple):
    """Where a checkpoint cuts through the run: after round `number` of `channel`, before a worker trains again."""

    channel: str
    number: int


class Order(NamedTuple):
    """A checkpoint that is wanted. A worker keeps its state to itself and leaves for the reason `parting`, if any."""

    folder: str
    parting: str = ""


class Draft(NamedTuple):
    """A checkpoint that is written and not committed, or of which there are no files, for the workers part there."""

    folder: str
    descriptions: dict[int, Description]
    files: tuple[File, ...]


class Desk:
    """Where the members of a run agree on checkpoints: a checkpoint has all of them between the same two rounds.

    Coroutines are called on behalf of workers, again and again until they are answered if a network lies between; they
    raise `Abandoned` when there is no such checkpoint (any more).
    """

    def __init__(self) -> None:
        self._margin = 1
        self._vain: dict[str, int] = {}  # a channel's newest round when a cut was made there that did not come
        self._open: _Open | None = None
        self._ordered = asyncio.Event()
        self._ended = ""

    def begin(self, folder: str, members: Collection[int], parting: str = "") -> asyncio.Future[Draft]:
        """Order a checkpoint of these workers; the future is done when it is written, or fails with `Abandoned`.

        Or one at which they leave for the reason `parting`: it is done when all have said what they hold.

        Raises `Abandoned` at once if a worker has finished: its last state is gone, and the run is nearly over.
        """
        if self._ended:
            raise Abandoned(self._ended)
        self.abandon("another checkpoint is begun")
        self._open = _Open(Order(folder, parting), frozenset(members))
        self._ordered.set()
        self._ordered = asyncio.Event()
        return self._open.draft

    def abandon(self, reason: str) -> None:
        """Give up the checkpoint under way, if there is one."""
        self._abandon(Abandoned(reason))

    @property
    def missing(self) -> str:
        """What the checkpoint under way is waiting for."""
        draft = self._open
        if draft is None:
            return "nothing"
        if silent := draft.members - draft.standings.said.keys():
            return f"workers {sorted(silent)} have not said which rounds they have settled"
        if draft.cut is not None and (silent := draft.members - draft.descriptions.said.keys()):
            return f"for workers {sorted(silent)} round {draft.cut.number} of '{draft.cut.channel}' has not come"
        return f"workers {sorted(draft.members - draft.files.keys())} have not written their share"

    def left(self, worker: int, finished: bool) -> None:
        """The worker has left the run."""
        if finished:
            self._ended = f"worker {worker} has finished"
        if self._open is not None and worker in self._open.members:
            self.abandon(f"worker {worker} has {'finished' if finished else 'gone'}")

    async def order(self, worker: int, known: str) -> Order:
        """Return what is wanted, as soon as that is a checkpoint which the worker does not know."""
        while self._open is None or self._open.order.folder == known or worker not in self._open.members:
            await self._ordered.wait()
        return self._open.order

    async def stand(self, worker: int, folder: str, rounds: Mapping[str, int]) -> Cut:
        """Hear which rounds the worker has settled, by channel; return where it takes its state, when all have said it.

        That lies ahead of everybody, unless somebody is quicker than this answer: then `describe` finds out.
        """
        draft = self._at(worker, folder)
        if worker in draft.descriptions.said:  # it begins anew, and what the others go by is gone
            raise self._abandon(Abandoned(f"worker {worker} does not have the state any more that it described"))
        return await draft.standings.add(worker, rounds, self._cut)

    async def describe(self, worker: int, folder: str, description: Description) -> tuple[str, ...]:
        """Hear what the worker holds; return the digests of the chunks that it is to write, when all have said it."""
        shares = await self._at(worker, folder).descriptions.add(worker, description, self._plan)
        return shares[worker]

    async def wrote(self, worker: int, folder: str, file: File) -> None:
        """The worker's share is written."""
        draft = self._at(worker, folder)
        draft.files[worker] = file
        if draft.files.keys() == draft.members and not draft.draft.done():
            files = tuple(draft.files[member] for member in sorted(draft.members))
            self._done(draft, files)

    async def failed(self, worker: int, folder: str, reason: str) -> None:
        """The worker could not do its part."""
        if self._open is not None and self._open.order.folder == folder:
            self.abandon(f"worker {worker}: {reason}")

    def _at(self, worker: int, folder: str) -> _Open:
        if self._open is None or self._open.order.folder != folder or worker not in self._open.members:
            raise Abandoned(f"checkpoint {folder} is over")
        return self._open

    def _cut(self, standings: dict[int, Mapping[str, int]]) -> Cut:
        """Return a round of the channel that all have and on which rounds are the most frequent.

        A rule may have done with a channel on which there were many: if its next one did not come for the last
        checkpoint, another channel is taken.
        """
        newest = {
            channel: max(rounds[channel] for rounds in standings.values())
            for channel in set.intersection(*(set(rounds) for rounds in standings.values()))
        }
        if not newest:
            raise self._abandon(Abandoned("no round has been settled yet"))
        going_on = [channel for channel in sorted(newest) if newest[channel] > self._vain.get(channel, -1)]
        channel = max(going_on or sorted(newest), key=lambda channel: newest[channel])
        assert self._open is not None
        self._open.stood, self._open.cut = newest[channel], Cut(channel, newest[channel] + self._margin)
        return self._open.cut

    def _plan(self, descriptions: dict[int, Description]) -> Shares:
        apart = uneven(descriptions)
        if apart:
            self._margin *= 2
            raise self._abandon(Uneven(f"the workers took their states between different rounds: {apart}"))
        assert self._open is not None
        if self._open.order.parting:
            self._done(self._open, ())
            return dict.fromkeys(descriptions, ())
        return plan(descriptions)

    def _done(self, draft: _Open, files: tuple[File, ...]) -> None:
        draft.draft.set_result(Draft(draft.order.folder, dict(draft.descriptions.said), files))
        self._open = None

    def _abandon(self, error: Abandoned) -> Abandoned:
        draft, self._open = self._open, None
        if draft is not None:
            if draft.cut is not None and draft.descriptions.said.keys() != draft.members:
                self._vain[draft.cut.channel] = draft.stood
            draft.fail(error)
        return error


class _Open:
    """A checkpoint under way."""

    def __init__(self, order: Order, members: frozenset[int]) -> None:
        self.order, self.members = order, members
        self.cut: Cut | None = None
        self.stood = 0  # the newest round of the cut's channel when it was made
        self.standings: _Gathering[Mapping[str, int], Cut] = _Gathering(members)
        self.descriptions: _Gathering[Description, Shares] = _Gathering(members)
        self.files: dict[int, File] = {}
        self.draft: asyncio.Future[Draft] = asyncio.get_running_loop().create_future()
        self.draft.add_done_callback(_looked_at)

    def fail(self, error: Abandoned) -> None:
        for future in (self.standings.answer, self.descriptions.answer, self.draft):
            if not future.done():
                future.set_exception(error)


class _Gathering(Generic[T, R]):
    """What each member says once, and what all are answered when everybody has said it."""

    def __init__(self, members: frozenset[int]) -> None:
        self._members = members
        self.said: dict[int, T] = {}
        self.answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self.answer.add_done_callback(_looked_at)

    async def add(self, worker: int, said: T, conclude: Callable[[dict[int, T]], R]) -> R:
        self.said[worker] = said
        if self.said.keys() == self._members and not self.answer.done():
            self.answer.set_result(conclude(self.said))
        return await asyncio.shield(self.answer)


def _looked_at(future: asyncio.Future[Any]) -> None:
    """A failure that nobody waits for is nobody's: everybody hears of it at the next step."""
    if not future.cancelled():
        future.exception()
