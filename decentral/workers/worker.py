"""One worker of a real run, as the Ray actor that `launch` makes of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import ray
import safetensors.torch
import torch

from decentral.config import Run, validated
from decentral.offload import OffloadedReplica
from decentral.peer import Peer
from decentral.replica import TorchReplica
from decentral.workers import rpc
from decentral.workers.buffers import prepare_memory
from decentral.workers.coordinator import CoordinatorClient, Entrant
from decentral.workers.pace import Pace
from decentral.workers.transport import Contact, Transport
from decentral.workers.world import Inbox, RealWorld

SLOT = "slot."
"""Prefix of the rule's buffers among the tensors of a result."""


class Worker:
    """Trains one replica. `table` is the run file's contents; `incarnation` counts the lives of worker `worker`.

    No method may be a coroutine: Ray would then run all of them on an event loop of its own.
    """

    def __init__(self, table: dict[str, Any], worker: int, incarnation: int, secret: str) -> None:
        self._table, self._worker, self._incarnation, self._secret = table, worker, incarnation, secret
        self._peer: Peer | None = None

    def run(self, coordinator: str) -> str:
        """Join at the coordinator's address, train, leave; return why the worker left.

        Raises `TaskError`, `ConfigError` or `RunError` as the driver shall see it.
        """
        prepare_memory()
        run = validated(self._table, "run")
        torch.set_num_threads(run.real.threads)
        place = Place(
            coordinator,
            rpc.Keys.here(self._secret, run.real.certificates),
            host=rpc.host_here(),
            device=torch.device("cuda" if ray.get_gpu_ids() else "cpu"),
        )
        self._peer, reason = asyncio.run(live(run, self._worker, self._incarnation, place))
        return reason

    def result(self) -> bytes:
        """Return the trained state as safetensors: `params` and `slot.<name>`, each `[P]` float32."""
        assert self._peer is not None
        tensors = {"params": self._peer.params, **{SLOT + name: slot for name, slot in self._peer.slots.items()}}
        return safetensors.torch.save({name: tensor.detach().cpu() for name, tensor in tensors.items()})


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker finds itself: the coordinator's address, its keys, the host it listens on, its device."""

    coordinator: str
    keys: rpc.Keys
    host: str
    device: torch.device


async def live(run: Run, worker: int, incarnation: int, place: Place) -> tuple[Peer, str]:
    """Join the run, train, leave; return the peer as it ended and why it left. Raises as `Worker.run` does."""
    replica = (OffloadedReplica if run.real.offload else TorchReplica)(
        run.make_task(),
        run.inner,
        worker=worker,
        seed=run.seed,
        batch_size=run.batch_size,
        total_steps=run.steps,
        device=place.device,
    )
    run.rule.check_layout(replica.layout)
    inbox = Inbox()
    transport = Transport(
        inbox,
        keys=place.keys,
        max_packet_bytes=_largest_packet(replica),
        patience_s=run.patience_s,
        pace=pace_of(run, worker),
    )
    client = CoordinatorClient(place.coordinator, worker, place.keys)
    try:
        address = await transport.start(place.host)
        entrant = Entrant(worker, incarnation, address, replica.digest(), replica.layout.size)
        members, entrants = await client.join(entrant, run.real.start_timeout_s)
        world = RealWorld(transport, client, incarnation=incarnation, speed=run.fleet.each()[worker].speed)
        peer = inbox.peer = Peer(
            world,
            replica,
            members,
            worker=worker,
            seed=run.seed,
            steps=run.steps,
            evaluate_every=run.evaluate_every,
            patience_s=run.patience_s,
            norm_limit=run.norm_limit,
        )
        contacts = {entry.worker: Contact(entry.incarnation, entry.address) for entry in entrants}
        return peer, await world.live(peer, run.rule, contacts)
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


def _largest_packet(replica: TorchReplica) -> int:
    """Return a size no honest packet has: twice the parameters in float32, and some room for small models."""
    return 8 * replica.layout.size + (1 << 20)
