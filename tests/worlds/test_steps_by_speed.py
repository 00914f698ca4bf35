"""Phases that fit the workers' speeds, by the machine's clock over real sockets."""

from __future__ import annotations

import pytest
from sockets import train_here

from decentral.config import Run
from decentral.fleet import Fleet, WorkerGroup
from decentral.inner import SGD
from decentral.journal import Trained
from decentral.protocols import DiLoCo, DyLU, NoLoCo, SyncRule
from decentral.protocols.schedule import PROBE


@pytest.mark.parametrize("rule", [DiLoCo, NoLoCo], ids=lambda rule: rule.name)
def test_a_slow_worker_does_fewer_steps_to_the_same_rounds(rule: type[SyncRule]) -> None:
    """A tenth of the speed is a tenth of the steps; on a busy machine, at least fewer than half."""
    run = Run(
        rule=rule(period=DyLU(period=40)),
        steps=170,
        batch_size=4,
        evaluate_every=0,
        task={"name": "quadratic", "dimension": 5_000},
        inner=SGD(lr=0.1),
        fleet=Fleet(workers=(WorkerGroup(), WorkerGroup(speed=0.1))),
    )
    records = train_here(run).records
    fast, slow = (
        [record.steps for record in records if isinstance(record, Trained) and record.worker == worker]
        for worker in (0, 1)
    )
    assert fast[0] == slow[0] == PROBE
    together = slice(3, len(fast) - 1)
    assert set(fast[together]) == {40}
    assert all(2 <= steps < 20 for steps in slow[together])
