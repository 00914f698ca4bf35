"""The coordinator as the driver's Ray actor, and the checkpoints it has its workers make."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import ray

from decentral.checkpoint import Abandoned, Archive, Storage, StorageError, in_thread, make_checkpoint, part
from decentral.config import Run, validated
from decentral.errors import RunError
from decentral.leases import LeaseBook
from decentral.workers import rpc
from decentral.workers.cluster import host_here
from decentral.workers.coordinator import SILENCE_S, Coordinator, Poll
from decentral.workers.coordinator_rpc import CoordinatorServer
from decentral.workers.crew import Parted
from decentral.workers.ledger import Ledger, remove_stale
from decentral.workers.resume import Resumption
from decentral.workers.status import Status
from decentral.workers.transport import call_worker

log = logging.getLogger(__name__)


class CoordinatorActor:
    """Hosts a run's coordinator. `table` is the run file's contents; checkpoints are known by the word `owner`.

    One that finds the `ledger` of another goes on as that one.
    """

    def __init__(
        self, table: dict[str, Any], secret: str, owner: str, ledger: Path, resumed: Resumption | None
    ) -> None:
        self._table, self._secret, self._owner, self._ledger, self._resumed = table, secret, owner, ledger, resumed
        self._coordinator: Coordinator | None = None
        self._server: CoordinatorServer | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._at_desk = asyncio.Lock()

    async def start(self, port: int) -> tuple[str, str]:
        """Listen on this machine's `port`; return the address and Ray's name of the node.

        Raises `ConfigError`, and `RunError`: a port in use.
        """
        run = validated(self._table, "run")
        keys = rpc.Keys.here(self._secret, run.real.certificates)
        self._ledger.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(self._ledger.parent)
        goes_on = self._ledger.exists()
        self._coordinator = Coordinator(
            range(run.fleet.size),
            silence_s=max(SILENCE_S, run.patience_s),
            call=lambda address: call_worker(address, keys),
            ledger=Ledger(self._ledger),
            book=self._book(run),
            resumed=self._resumed,
            grid=run.pipeline.grid,
        )
        if run.checkpoint.url:
            archive = Archive(Storage(run.checkpoint.url), self._owner, run.checkpoint.keep)
            if not goes_on:  # else the place is ours already, or another run's by now: the next commit finds out
                await in_thread(lambda: archive.claim(resume=self._resumed is not None))
            self._keeping = asyncio.create_task(self._keep_checkpoints(run, archive, self._coordinator))
        server = CoordinatorServer(self._coordinator, keys)
        address = await server.start(host_here(), port)
        self._server = server
        return address, ray.get_runtime_context().get_node_id()

    async def begin(self) -> None:
        """Begin with whoever has joined."""
        self._started().begin()

    async def remove(self, worker: int, life: int, reason: str) -> None:
        """That life of the worker is over."""
        self._started().remove(worker, life, reason)

    async def poll(self, taken: int) -> Poll:
        """Return what is new to who has taken so many records."""
        return self._started().poll(taken)

    async def part(self, reason: str, timeout_s: float) -> Parted | None:
        """Have all workers leave for that reason, each with its state at the same point; None if they cannot now."""
        coordinator = self._started()
        async with self._at_desk:
            members, lines = coordinator.members, Counter(coordinator.lines_before)
            if set(members.party()) != set(coordinator.expected):
                return None
            try:
                workers = await part(coordinator.desk, members.party().ids, reason, timeout_s)
            except Abandoned:
                return None
        lines.update({worker: description.life.records for worker, description in workers.items()})
        return Parted(workers, lines)

    async def status(self, run: str) -> Status:
        """Return what the run called so has come to, as plain values."""
        return self._started().status(run)

    async def close(self, taken: int) -> Poll:
        """Return what `poll` does; the run is over: nobody needs the ledger any more, and others may have the port."""
        last = await self.poll(taken)
        Ledger(self._ledger).remove()
        if self._server is not None:
            await self._server.stop()
        return last

    def _started(self) -> Coordinator:
        assert self._coordinator is not None
        return self._coordinator

    def _book(self, run: Run) -> LeaseBook | None:
        if not run.leases:
            return None
        book = LeaseBook(run.batch_size, run.leased_samples(run.make_task()))
        if self._resumed is not None and self._resumed.leases is not None:
            book.restore(self._resumed.leases)
        return book

    async def _keep_checkpoints(self, run: Run, archive: Archive, coordinator: Coordinator) -> None:
        """Have a checkpoint made again and again. What stands in the way of one does not stop training."""
        await coordinator.begun()
        while True:
            await asyncio.sleep(run.checkpoint.every_s)
            try:
                async with self._at_desk:
                    folder, manifest = await make_checkpoint(
                        coordinator.desk,
                        archive,
                        coordinator.members.party().ids,
                        in_thread,
                        run=self._table,
                        timeout_s=run.checkpoint.writing_s,
                        earlier=coordinator.lines_before,
                        journalled=coordinator.journalled,
                    )
            except (Abandoned, StorageError) as error:
                coordinator.tell(f"no checkpoint: {error}")
            except RunError as error:
                coordinator.tell(f"no checkpoints any more: {error}")
                return
            except Exception as error:
                coordinator.tell(f"no checkpoints any more: {type(error).__name__}: {error}")
                raise
            else:
                coordinator.tell(f"checkpoint {folder} after {manifest.step} local steps")
