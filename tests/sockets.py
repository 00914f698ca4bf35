"""The real world without Ray: every worker's transport, thread and coordinator client in this process.

Everything but the placing of actors is what a run on Ray uses, in a tenth of the time.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import torch

from decentral.config import Run
from decentral.journal import Left, record_from
from decentral.leases import LeaseBook
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.workers.coordinator import Coordinator
from decentral.workers.coordinator_rpc import CoordinatorServer, Dismissed
from decentral.workers.rpc import Keys
from decentral.workers.worker import Place, live

KEYS = Keys("the run's secret of these tests")


class Died(BaseException):
    """What a worker raises to die without a word: its sockets close, and the coordinator is told, as by the driver."""


def train_here(run: Run, lives: int = 1) -> Outcome:
    """Train over real sockets; raises what a worker raised, unless it `Died`: then it comes back, up to `lives` times.

    A worker's parameters are those of its last life, if that has finished.
    """
    return asyncio.run(training(run, lives))


async def training(
    run: Run, lives: int = 1, keys: Keys = KEYS, coordinator_of: Callable[..., Coordinator] = Coordinator
) -> Outcome:
    """Train as `train_here` does, beside whatever else goes on. Who is dismissed comes back no more."""
    book = LeaseBook(run.batch_size, run.leased_samples(run.make_task())) if run.leases else None
    coordinator = coordinator_of(range(run.fleet.size), silence_s=math.inf, book=book, grid=run.pipeline.grid)
    server = CoordinatorServer(coordinator, keys)
    place = Place(await server.start("127.0.0.1", 0), keys, "127.0.0.1", torch.device("cpu"))

    async def live_again_and_again(worker: int) -> Peer | None:
        for life in range(lives):
            try:
                peer, reason = await live(run, worker, life, place)
                return peer if reason == "finished" else None
            except Died:
                coordinator.remove(worker, life, "crashed")
            except Dismissed:
                return None
        return None

    try:
        ended = await asyncio.gather(*[live_again_and_again(worker) for worker in range(run.fleet.size)])
    finally:
        await server.stop()
    records = [record_from(fields) for fields in coordinator.poll(0)["records"]]
    outcome = Outcome(records, max(record.time_s for record in records if isinstance(record, Left)))
    outcome.grid = run.pipeline.grid
    outcome.assemble = run.pipeline.assemble(run.make_task(), run.seed, run.batch_size)
    for worker, peer in enumerate(ended):
        if peer is not None:
            outcome.params[worker], outcome.slots[worker] = peer.params, peer.slots
    return outcome
