"""Checkpoints in real time: workers with threads and sockets of their own train on while their states are written."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from lives import live, run_of
from sockets import train_here

from decentral.checkpoint import Archive, Desk, Storage, keep, load, make_checkpoint, newest
from decentral.peer import Peer
from decentral.protocols import DiLoCo, Int8
from decentral.protocols.codecs import ErrorFeedback

PLAIN = DiLoCo(period=5, codec=ErrorFeedback(codec=Int8()))
STEPS = 600


class Kept(DiLoCo):
    """DiLoCo, with one checkpoint that begins as soon as a round is settled."""

    desk: Any = None
    storage: Any = None

    async def run(self, peer: Peer) -> None:
        peer.spawn(keep(peer, self.desk, self.storage, asyncio.to_thread))
        if peer.id == 0:
            peer.spawn(self.checkpoint(peer))
        await super().run(peer)

    async def checkpoint(self, peer: Peer) -> None:
        archive = Archive(self.storage, "a1", keep=2)
        archive.claim(resume=False)
        while not peer.rounds_settled.get("sync"):
            await asyncio.sleep(0)
        await make_checkpoint(self.desk, archive, list(peer.members), asyncio.to_thread, run={}, timeout_s=60.0)


def test_a_simulation_goes_on_from_a_real_runs_checkpoint_to_the_real_runs_end(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "kept"))
    rule = Kept(period=PLAIN.period, codec=PLAIN.codec, desk=Desk(), storage=storage)
    real = train_here(run_of(rule, steps=STEPS))
    found = newest(storage)
    assert found is not None
    assert 0 < found.manifest.step < STEPS
    simulated = live(run_of(PLAIN, steps=STEPS), restored={worker: load(storage, found, worker) for worker in range(3)})
    for worker, peer in simulated.peers.items():
        assert peer.params.equal(real.params[worker])
        assert peer.slots["momentum"].equal(real.slots[worker]["momentum"])
        assert peer.slots["sync.0.residual"].equal(real.slots[worker]["sync.0.residual"])
