"""A worker's part in checkpoints: it takes its state at rest, and describes and writes it while it trains on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Protocol

from decentral.checkpoint.archive import write_share
from decentral.checkpoint.contents import describe
from decentral.checkpoint.desk import Abandoned, Cut, Order
from decentral.checkpoint.manifest import Description, File
from decentral.checkpoint.settings import WRITING_S
from decentral.checkpoint.storage import Storage, StorageError
from decentral.errors import PeerGone, RunError
from decentral.peer import Peer
from decentral.snapshot import Snapshot

Aside = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs blocking work, in a thread of its own where time is real, and returns what it returns."""

RETRY_S = 1.0
"""Seconds until the desk is asked again after it could not be reached."""


class DeskLine(Protocol):
    """How a worker reaches the `Desk`. It may raise `RunError` when it does not, and `Abandoned` as the desk does."""

    async def order(self, worker: int, known: str) -> Order: ...
    async def stand(self, worker: int, folder: str, rounds: Mapping[str, int]) -> Cut: ...
    async def describe(self, worker: int, folder: str, description: Description) -> tuple[str, ...]: ...
    async def wrote(self, worker: int, folder: str, file: File) -> None: ...
    async def failed(self, worker: int, folder: str, reason: str) -> None: ...


async def keep(peer: Peer, desk: DeskLine, storage: Storage, aside: Aside, writing_s: float = WRITING_S) -> None:
    """Take part in all checkpoints of the run, for ever: `peer.spawn` this beside the rule.

    Training waits for nothing but the copy of the state out of live buffers. What goes wrong is told to the desk, and
    never ends the worker; a checkpoint at which all leave does, with the state in `peer.held`. A round that does not
    come within `writing_s` seconds may never come: its channel is over.
    """
    done = ""
    while True:
        folder = ""
        try:
            folder, parting = await desk.order(peer.id, done)
            await _take_part(peer, desk, storage, aside, folder, parting, writing_s)
            done = folder  # one that came to nothing may be ordered again under the same name
        except Abandoned:
            continue
        except StorageError as error:
            await _tell(desk, peer.id, folder, str(error))
        except RunError:
            await asyncio.sleep(RETRY_S)


async def _take_part(
    peer: Peer, desk: DeskLine, storage: Storage, aside: Aside, folder: str, parting: str, writing_s: float
) -> None:
    cut = await desk.stand(peer.id, folder, peer.rounds_settled)
    try:
        snapshot = await asyncio.wait_for(state_at(peer, cut), writing_s)
    except (asyncio.TimeoutError, TimeoutError):
        raise Abandoned(f"round {cut.number} of '{cut.channel}' has not come within {writing_s:g} s") from None
    description = await aside(partial(describe, peer.id, snapshot))
    peer.held = snapshot if parting else None  # before the others can know, who may be gone before we hear of it
    share = await desk.describe(peer.id, folder, description)
    if parting:
        peer.fail(PeerGone(parting))
        return
    file = await aside(partial(write_share, storage, folder, snapshot, description, share))
    peer.have_back(snapshot)  # if something fails, a thread may still be reading it
    await desk.wrote(peer.id, folder, file)


async def _tell(desk: DeskLine, worker: int, folder: str, reason: str) -> None:
    try:
        await desk.failed(worker, folder, reason)
    except RunError:
        await asyncio.sleep(RETRY_S)


def state_at(peer: Peer, cut: Cut) -> asyncio.Future[Snapshot]:
    """Return what will be the worker's whole state at its first rest from that round on, before it trains again."""
    taken: asyncio.Future[Snapshot] = asyncio.get_running_loop().create_future()
    _AtRest(peer, cut, taken)
    return taken


class _AtRest:
    """Waits at a peer for the rest at which its state is wanted."""

    def __init__(self, peer: Peer, cut: Cut, taken: asyncio.Future[Snapshot]) -> None:
        self._peer, self._cut, self._taken = peer, cut, taken
        peer.keepers.append(self)

    def rest(self) -> None:
        if self._taken.done():  # whoever wanted it has been cancelled
            self._peer.keepers.remove(self)
        elif self._peer.rounds_settled.get(self._cut.channel, 0) >= self._cut.number:
            self._peer.keepers.remove(self)
            self._taken.set_result(self._peer.whole_snapshot())
