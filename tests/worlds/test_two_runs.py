"""Two runs on one machine, one of which has the other's address for a worker of its own: they never mix."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import Any

import pytest
from cluster import all_equal, cluster, outcomes, rounds
from sockets import training

from decentral.journal import Refused
from decentral.outcome import Outcome
from decentral.protocols import DiLoCo
from decentral.sim.simulate import simulate
from decentral.workers import rpc
from decentral.workers.coordinator import Coordinator, Entrant, Welcome
from decentral.workers.rpc import Keys
from decentral.workers.transport import call_worker

OURS, THEIRS = Keys("the secret of our run"), Keys("the secret of their run")
RUN = cluster(DiLoCo(period=2), workers=3, steps=40, patience_s=20.0, seed=1)
OTHER = cluster(DiLoCo(period=2), workers=3, steps=400, patience_s=20.0, seed=2)


def test_a_run_that_has_anothers_address_does_without_that_worker_and_the_other_does_not_notice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As when a worker has died, and its port is the other run's now."""
    caplog.set_level(logging.WARNING, logger=rpc.__name__)
    ours, theirs = asyncio.run(asyncio.wait_for(side_by_side(), 120))

    assert theirs.params[0].equal(simulate(OTHER).params[0])
    assert all(found == {("committed", (0, 1, 2))} for found in outcomes(theirs))
    assert [left.reason for left in theirs.left()] == ["finished"] * 3
    for outcome in (ours, theirs):
        assert not [record for record in outcome.records if isinstance(record, Refused)]

    assert sorted(ours.params) == [0, 2]
    assert all_equal(ours)
    assert {left.worker: left.reason for left in ours.left()} == {0: "finished", 1: "crashed", 2: "finished"}
    assert {item.outcome for items in rounds(ours).values() for item in items} == {"degraded", "committed"}

    counts = [record.args for record in caplog.records if record.name == rpc.__name__]
    assert counts
    assert all("without the run's secret" in record.message for record in caplog.records if record.args in counts)


async def side_by_side() -> tuple[Outcome, Outcome]:
    """Train both; where worker 1 of ours listens our coordinator has worker 1 of theirs."""
    theirs: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    class Told(Coordinator):
        async def join(self, entrant: Entrant) -> Welcome:
            if entrant.worker == 1:
                theirs.set_result(entrant.address)
            return await super().join(entrant)

    class Misled(Coordinator):
        async def join(self, entrant: Entrant) -> Welcome:
            if entrant.worker == 1:
                entrant = dataclasses.replace(entrant, address=await theirs)
            return await super().join(entrant)

    def misled(*arguments: Any, **options: Any) -> Coordinator:
        return Misled(*arguments, call=lambda address: call_worker(address, OURS), **options)

    return await asyncio.gather(
        training(RUN, keys=OURS, coordinator_of=misled), training(OTHER, keys=THEIRS, coordinator_of=Told)
    )
