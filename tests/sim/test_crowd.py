"""Who leaves is missed at once by those who wait for it, and by the others when they look."""

from __future__ import annotations

import asyncio

import pytest

from decentral.config import validated
from decentral.errors import PeerGone
from decentral.journal import Synced
from decentral.peer import Peer
from decentral.protocols import SyncRule
from decentral.sim.simulate import simulate
from decentral.wire import Tag, signal

NEWS, NEVER = Tag("news", 1), Tag("never", 1)


class Waiting(SyncRule):
    """Worker 2 will crash. 0 and 1 wait for it, 1 among others; 3 waits for 4, who looks twice and then answers."""

    async def run(self, peer: Peer) -> None:
        if peer.id == 2:
            await asyncio.sleep(100.0)
        elif peer.id == 4:
            for _ in range(2):
                await asyncio.sleep(1.0)
                peer.ended_round(f"looks {peer.now():g}", 1, "sees", peer.members.ids)
            await peer.send(3, NEWS, signal("here"))
        else:
            waits_for = {0: 2, 1: 3, 3: 4}[peer.id]
            try:
                await peer.recv(
                    waits_for, NEWS if peer.id == 3 else NEVER, among=peer.members if peer.id == 1 else None
                )
                outcome = "came"
            except PeerGone:
                outcome = "gone"
            peer.ended_round("wait", 1, outcome, peer.members.ids)


@pytest.mark.parametrize("detection_s", [0.0, 0.75])
def test_a_death_ends_the_waits_it_concerns_and_no_other(detection_s: float) -> None:
    fleet = {"workers": [{"count": 5}], "latency_s": 0.5, "up_bps": 1e12, "down_bps": 1e12, "detection_s": detection_s}
    events = [{"at_s": 0.5, "kind": "crash", "worker": 2}]
    table = {
        "steps": 1,
        "task": {"name": "quadratic"},
        "inner": {"name": "sgd", "lr": 0.1},
        "rule": Waiting(),
        "fleet": {**fleet, "events": events},
    }
    records = simulate(validated(table, "test"), timing_only=True).records
    told = [record for record in records if isinstance(record, Synced)]
    waits = {record.worker: record for record in told if record.channel == "wait"}
    for worker in (0, 1):
        assert (waits[worker].outcome, waits[worker].time_s) == ("gone", 0.5 + detection_s)
        assert waits[worker].members == (0, 1, 3, 4)
    assert (waits[3].outcome, waits[3].members) == ("came", (3, 4))  # 0 and 1 have done their part by then
    assert waits[3].time_s == pytest.approx(2.5, abs=1e-6)
    looks = {record.channel: record.members for record in told if record.worker == 4}
    assert looks == {"looks 1": (3, 4) if detection_s == 0 else (0, 1, 2, 3, 4), "looks 2": (3, 4)}
