"""Training loops as anybody writes them, in threads of this process, each with a rule beside it over real sockets."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import torch
from sockets import KEYS
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from decentral.config import Run
from decentral.embedded.copies import Copy
from decentral.embedded.gate import Gate
from decentral.embedded.replica import AttachedReplica
from decentral.embedded.site import Site
from decentral.embedded.sync import Sync
from decentral.inner import SGD as OurSGD
from decentral.journal import Left, record_from
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.replica import initial_model
from decentral.workers.coordinator import Coordinator
from decentral.workers.coordinator_rpc import CoordinatorServer
from decentral.workers.worker import Place, live

LONG_S = 60.0


def optimizer_of(run: Run, model: nn.Module) -> Optimizer:
    """Return torch's own optimiser with the run's settings."""
    inner = run.inner
    if isinstance(inner, OurSGD):
        return SGD(model.parameters(), lr=inner.lr, momentum=inner.momentum, fused=True)
    return AdamW(model.parameters(), lr=inner.lr, betas=(0.9, 0.99), weight_decay=0.1, fused=True)


def loop(run: Run, worker: int, model: nn.Module, optimizer: Optimizer, step: Callable[[], bool], steps: int) -> None:
    """Train on the batches that a worker of the run trains on."""
    task = run.make_task()
    for number in range(steps):
        optimizer.zero_grad()
        task.loss(model, task.batch(worker, number * run.batch_size, run.batch_size)).backward()
        optimizer.step()
        step()


def train_loops(run: Run, steps: int | None = None) -> Outcome:
    """Return what a run comes to whose local steps are those of loops, each of so many steps (None: the run's)."""
    return asyncio.run(_training(run, steps or run.steps))


async def _training(run: Run, steps: int) -> Outcome:
    coordinator = Coordinator(range(run.fleet.size), silence_s=math.inf)
    server = CoordinatorServer(coordinator, KEYS)
    place = Place(await server.start("127.0.0.1", 0), KEYS, "127.0.0.1", torch.device("cpu"))

    async def one(worker: int) -> Peer:
        model = initial_model(run.make_task(), run.seed)
        optimizer, site, gate = optimizer_of(run, model), Site(), Gate()
        copy = Copy(model, optimizer, site)
        sync = Sync(copy, site, gate)
        copy.gather()
        replica = AttachedReplica(copy, gate, run.batch_size)

        def train() -> None:
            sync.begin()
            loop(run, worker, model, optimizer, sync.step, steps)
            sync.close()

        training = asyncio.create_task(asyncio.to_thread(train))
        met: list[Peer] = []

        def meet(peer: Peer) -> None:
            replica.ends = peer.ends
            met.append(peer)

        error: BaseException | None = None
        try:
            await live(run, worker, 0, place, replica.anew, meet)
        except BaseException as raised:
            error = raised
            raise
        finally:
            gate.end(error)
        await training
        flat = torch.cat([parameter.detach().view(-1) for parameter in model.parameters()])
        assert flat.equal(met[0].params), "the model is not what the rule has left"
        return met[0]

    try:
        ended = await asyncio.wait_for(asyncio.gather(*[one(worker) for worker in range(run.fleet.size)]), LONG_S)
    finally:
        await server.stop()
    records = [record_from(fields) for fields in coordinator.poll(0)["records"]]
    outcome = Outcome(records, max(record.time_s for record in records if isinstance(record, Left)))
    for worker, peer in enumerate(ended):
        outcome.params[worker], outcome.slots[worker] = peer.params, peer.slots
    return outcome
