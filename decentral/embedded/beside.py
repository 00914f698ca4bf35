"""The worker beside a training loop: an event loop in a thread of its own, and on it all that a worker is."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from decentral.config import Run
from decentral.embedded.coordination import See, coordinate
from decentral.embedded.gate import Gate
from decentral.embedded.replica import AttachedReplica
from decentral.embedded.whereabouts import Whereabouts
from decentral.errors import PeerGone, RunError
from decentral.peer import PREEMPTED, Peer
from decentral.workers.rpc import Keys, address_of
from decentral.workers.worker import Place, live

log = logging.getLogger(__name__)


class Beside:
    """Lives the life of a worker. Worker 0 also serves the coordinator until all workers have left, if none is apart.

    It then hands `see` what they record. The gate is told how the life ended, and then `ended` is called, in the
    worker's thread.
    """

    def __init__(
        self,
        run: Run,
        here: Whereabouts,
        replica: AttachedReplica,
        gate: Gate,
        *,
        see: See,
        ended: Callable[[], None],
    ) -> None:
        self._run, self._here, self._replica, self._gate = run, here, replica, gate
        self._see, self._ended = see, ended
        self._keys = Keys.here(here.secret, run.real.certificates)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="decentral", daemon=True)
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._life: asyncio.Task[None] | None = None
        self._coordinator: asyncio.Task[None] | None = None
        self._peer: Peer | None = None

    def start(self) -> None:
        """Join the run."""
        self._thread.start()
        self._started.result()

    def leave(self, reason: str) -> None:
        """Leave the run at once. The journal will give that reason."""
        self._call(self._leave, reason)

    def wait(self) -> None:
        """Return when the worker has left, and all others too if it serves the coordinator; an interrupt ends that."""
        try:
            self._thread.join()
        except KeyboardInterrupt:
            self._call(self._give_up)
            self._thread.join()
            raise

    def _call(self, callback: Callable[..., None], *values: str) -> None:
        with suppress(RuntimeError):  # it has left, and its loop is closed
            self._started.result().call_soon_threadsafe(callback, *values)

    # -- in the thread -----------------------------------------------------------------------------------------------

    async def _main(self) -> None:
        self._life = asyncio.create_task(self._live())
        self._started.set_result(asyncio.get_running_loop())
        error: BaseException | None = None
        try:
            await self._life
        except BaseException as raised:
            error = raised
        self._gate.end(error)
        self._ended()
        if self._coordinator is not None:
            if self._peer is None:  # the run has not begun, and cannot without this worker
                self._coordinator.cancel()
            log.log(
                logging.INFO if error is None else logging.WARNING,
                "worker 0 has left the run; it serves the coordinator until all others have",
            )
            with suppress(asyncio.CancelledError):
                await self._coordinator

    async def _live(self) -> None:
        run, here = self._run, self._here
        if here.worker == 0 and not here.apart:
            await self._serve()
        place = Place(address_of(*here.address), self._keys, here.host, self._replica.params.device, supervised=False)
        number = time.time_ns() // 1_000_000  # a later life of this worker, on whatever machine, has a larger one
        _, reason = await live(run, here.worker, number, place, self._replica.anew, self._meet)
        if reason not in ("finished", PREEMPTED):
            raise RunError(f"worker {here.worker} is out of the run: {reason}")

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        serves = loop.create_future()
        coordinator = loop.create_task(coordinate(self._run, self._keys, self._here.address, self._see, serves))
        await serves
        self._coordinator = coordinator

    def _meet(self, peer: Peer) -> None:
        self._peer = peer
        self._replica.ends = peer.ends

    def _leave(self, reason: str) -> None:
        if self._peer is not None:
            self._peer.fail(PeerGone(reason))
        elif self._life is not None:
            self._life.cancel()

    def _give_up(self) -> None:
        for task in (self._life, self._coordinator):
            if task is not None:
                task.cancel()
