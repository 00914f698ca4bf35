"""The real world without Ray: every worker's transport, thread and coordinator client in this process.

Everything but the placing of actors is what a run on Ray uses, in a tenth of the time.
"""

from __future__ import annotations

import asyncio
import math

import torch

from decentral.config import Run
from decentral.journal import Left, record_from
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.workers.coordinator import Coordinator, CoordinatorServer
from decentral.workers.rpc import Keys
from decentral.workers.worker import Place, live

KEYS = Keys("the run's secret of these tests")


class Died(Exception):
    """What a worker raises to die: its sockets close, and the coordinator is told, as by the driver."""


def train_here(run: Run) -> Outcome:
    """Train over real sockets; raises what a worker raised, unless it `Died`."""
    return asyncio.run(_train(run))


async def _train(run: Run) -> Outcome:
    coordinator = Coordinator(range(run.fleet.size), silence_s=math.inf)
    server = CoordinatorServer(coordinator, KEYS)
    place = Place(await server.start("127.0.0.1", 0), KEYS, "127.0.0.1", torch.device("cpu"))

    async def life(worker: int) -> Peer | None:
        try:
            return (await live(run, worker, 0, place))[0]
        except Died:
            coordinator.remove(worker)
            return None

    try:
        ended = await asyncio.gather(*[life(worker) for worker in range(run.fleet.size)])
    finally:
        await server.stop()
    records = [record_from(fields) for fields in coordinator.drain_records()]
    outcome = Outcome(records, max(record.time_s for record in records if isinstance(record, Left)))
    for worker, peer in enumerate(ended):
        if peer is not None:
            outcome.params[worker], outcome.slots[worker] = peer.params, peer.slots
    return outcome
