"""One worker of a real run: it joins, trains and leaves. It knows nothing of Ray."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from decentral.checkpoint import Storage, in_thread, keep
from decentral.config import Run
from decentral.members import Members
from decentral.offload import OffloadedReplica
from decentral.peer import PREEMPTED, Peer
from decentral.pipeline import Line, Stages, TorchStage
from decentral.pipeline.memory import memory_bytes
from decentral.protocols.protection import Guard
from decentral.replica import Replica, TorchReplica
from decentral.snapshot import Snapshot
from decentral.wire import largest_packet
from decentral.workers import rpc
from decentral.workers.coordinator import Entrant
from decentral.workers.coordinator_rpc import CoordinatorClient, RemoteDesk
from decentral.workers.notices import sources_named
from decentral.workers.pace import Pace
from decentral.workers.transport import Transport
from decentral.workers.world import Inbox, RealWorld


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker finds itself: the coordinator's address, its keys, the host it listens on, its device.

    `saved` returns what the replica (or stage) begins with in a run that goes on from where it was. `supervised`:
    somebody ends it when the coordinator does not come back.
    """

    coordinator: str
    keys: rpc.Keys
    host: str
    device: torch.device
    saved: Callable[[Replica], Snapshot] | None = None
    supervised: bool = True


class Model(Replica, Protocol):
    """What a worker trains, and how long getting its batches has taken so far."""

    loading_s: float


async def live(
    run: Run,
    worker: int,
    life: int,
    place: Place,
    model: Callable[[], Model] | None = None,
    meet: Callable[[Peer], None] = lambda _peer: None,
) -> tuple[Peer, str]:
    """Join the run, train, leave; return the peer as it ended and why it left.

    A newcomer whose host goes before it takes part asks somebody else to let it in. `model` makes what is trained, with
    the initial weights each time (None: the run file's task says it), and `meet` is told of each peer before it begins.
    Raises `TaskError`, `ConfigError` or `RunError`.
    """
    while True:
        replica = _replica(run, worker, place.device) if model is None else model()
        peer, reason = await _live_once(run, worker, life, place, replica, meet)
        if reason in ("finished", PREEMPTED) or peer.guide is None:
            return peer, reason


async def _live_once(
    run: Run, worker: int, life: int, place: Place, replica: Model, meet: Callable[[Peer], None]
) -> tuple[Peer, str]:
    stage = replica if isinstance(replica, TorchStage) else None
    run.rule.check_layout(replica.layout)
    inbox = Inbox()
    pace = pace_of(run, worker)
    transport = Transport(
        inbox,
        keys=place.keys,
        max_packet_bytes=largest_packet(
            run.rule.vectors * (replica.layout.size if stage is None else stage.cut.largest)
        ),
        patience_s=run.patience_s,
        pace=pace,
    )
    absence_s = run.real.start_timeout_s
    away_s = math.inf if place.supervised else absence_s  # a supervisor ends those who wait in vain
    client = CoordinatorClient(place.coordinator, worker, place.keys, pace.latency_s, away_s)
    saved = None if place.saved is None else await in_thread(partial(place.saved, replica))
    try:
        address = await transport.start(place.host)
        stage_number = run.pipeline.grid.stage(worker)
        entrant = Entrant(worker, life, address, replica.digest(), replica.layout.size, stage_number)
        welcome = await client.join(entrant, 2 * absence_s)  # as the supervisor waits for latecomers
        speed = run.fleet.each()[worker].speed
        world = RealWorld(transport, client, incarnation=welcome.incarnation, speed=speed)
        peer = inbox.peer = Peer(
            world,
            replica,
            welcome.members,
            worker=worker,
            seed=run.seed,
            steps=run.steps,
            evaluate_every=run.evaluate_every,
            patience_s=run.patience_s,
            norm_limit=run.norm_limit,
            cohort=Members(0, tuple(range(run.fleet.size))),
            began_s=asyncio.get_running_loop().time() - welcome.elapsed_s,
            lease=world.lease if run.leases else None,
            bounded=run.epochs is not None,
            loading_s=lambda: replica.loading_s,
            column=run.pipeline.grid.column(worker, run.fleet.size),
            room_bytes=0 if stage is None else stage.room_bytes,
            cuts=run.cuts_phases,
        )
        if saved is not None and welcome.host is None:
            peer.restore(saved)
        if stage is not None:
            peer.row = Line(peer, stage, run.pipeline, run.fleet, recovers=run.takes_newcomers)
        if run.parity.workers is not None:
            Guard(peer, run.parity, run.fleet.places())
        if run.checkpoint.url:
            desk, storage = RemoteDesk(client, world.hand_in), Storage(run.checkpoint.url)
            peer.spawn(keep(peer, desk, storage, in_thread, run.checkpoint.writing_s))
        meet(peer)
        notices = sources_named(run.real.notices)
        return peer, await world.live(peer, run.rule, welcome, notices=notices, absence_s=absence_s, away_s=away_s)
    finally:
        await transport.close()
        await client.close()


def pace_of(run: Run, worker: int) -> Pace:
    """Return the pace that the run file sets for the worker's streams."""
    training_bps = run.real.stream_bps or None
    if not run.real.shape_links:
        return Pace(training_bps=training_bps)
    group, fleet = run.fleet.each()[worker], run.fleet
    return Pace(
        up_bps=group.up_bps or fleet.up_bps,
        down_bps=group.down_bps or fleet.down_bps,
        latency_s=fleet.latency_s,
        training_bps=training_bps,
    )


def _replica(run: Run, worker: int, device: torch.device) -> TorchReplica:
    """Return what the worker trains: a whole model, or its stage of one."""
    task = run.make_task()
    if run.pipeline.stages > 1:
        cut = run.pipeline.cut(task, run.seed, run.batch_size)
        stages = Stages(run.pipeline, cut, task, run.seed, run.batch_size, run.inner, run.fleet)
        who = f"worker {worker} has stage {run.pipeline.grid.stage(worker)} and the device '{device}'"
        stages.require_room(who, worker, [memory_bytes(device)] * cut.stages)  # before anything is allocated
        return run.make_stage(task, cut, worker, device)
    return (OffloadedReplica if run.real.offload else TorchReplica)(
        task,
        run.inner,
        worker=worker,
        seed=run.seed,
        batch_size=run.batch_size,
        total_steps=run.steps,
        device=device,
    )
