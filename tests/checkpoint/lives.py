"""Simulated runs whose workers may have had a life before, and beside which something goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from decentral.config import Run, validated
from decentral.journal import Record
from decentral.peer import Peer
from decentral.pipeline import Line, TorchStage
from decentral.protocols import SyncRule
from decentral.sim.clock import VirtualLoop
from decentral.sim.durations import fleet_of
from decentral.sim.engine import computed
from decentral.sim.world import SimWorld
from decentral.snapshot import Snapshot

Beside = Callable[[dict[int, Peer]], Coroutine[Any, Any, None]]


class Lives:
    """How a run went: its peers as they ended, and its records in order."""

    def __init__(self) -> None:
        self.peers: dict[int, Peer] = {}
        self.records: list[Record] = []

    def bits(self) -> dict[int, dict[str, bytes]]:
        """Return every tensor of every worker."""
        return {
            worker: {name: values.numpy().tobytes() for name, values in peer.whole_snapshot().tensors.items()}
            for worker, peer in sorted(self.peers.items())
        }


def live(run: Run, *, restored: Mapping[int, Snapshot] | None = None, beside: Beside | None = None) -> Lives:
    """Simulate the run, its workers restored from these snapshots. `beside` runs on the same loop until it ends."""
    lives, task = Lives(), run.make_task()
    with computed(run.model_copy(update={"sim": run.sim.model_copy(update={"processes": 1})}), task) as replicas:
        loop = VirtualLoop()
        fleet, grid = fleet_of(run, task, replicas[0].layout.size), run.pipeline.grid
        world = SimWorld(loop, fleet, run.seed, lives.records.append, grid=grid)

        def make(worker: int) -> Peer:
            peer = Peer(
                world,
                replicas[worker],
                world.members,
                worker=worker,
                seed=run.seed,
                steps=run.steps,
                evaluate_every=run.evaluate_every,
                patience_s=run.patience_s,
                norm_limit=run.norm_limit,
                crowd=world.crowd,
                cohort=world.cohort,
                began_s=0.0,
                column=grid.column(worker, run.fleet.size),
            )
            if restored:
                peer.restore(restored[worker])
            if isinstance(stage := replicas[worker], TorchStage):
                peer.row = Line(peer, stage, run.pipeline, fleet)
            lives.peers[worker] = peer
            return peer

        async def both() -> None:
            runs = asyncio.ensure_future(world.run(make, run.rule))
            if beside is not None:
                await asyncio.sleep(0)
                await beside(lives.peers)
            await runs

        try:
            loop.run_until_complete(both())
        finally:
            loop.close()
    return lives


def run_of(rule: SyncRule, *, workers: int = 3, steps: int = 16, **fields: Any) -> Run:
    """Return a run of equal workers, on quadratic bowls with noise and under AdamW unless `fields` say otherwise."""
    return validated(
        {
            "steps": steps,
            "batch_size": 4,
            "evaluate_every": 0,
            "task": {"name": "quadratic", "dimension": 24, "noise": 0.5},
            "rule": rule,
            "inner": {"name": "adamw", "lr": 0.02},
            "fleet": {"workers": [{}] * workers},
            **fields,
        },
        "test",
    )
