"""Workers that are later than the run's patience, and links that are cut between the living."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from cluster import all_equal, cluster, outcomes, rounds
from sockets import train_here

from decentral.config import Run
from decentral.fleet import Fleet, WorkerGroup
from decentral.inner import SGD
from decentral.protocols import DiLoCo
from decentral.protocols.collectives import AllReduce
from decentral.protocols.schedule import Every
from decentral.sim.simulate import simulate

STEP_S = 0.05
"""What a simulated local step takes at speed 1."""
EXCHANGE_S = 0.1
"""More than the messages of a round take there, without the waiting."""


@pytest.mark.parametrize("all_reduce", ["butterfly", "gather"])
@pytest.mark.parametrize("speeds", [(1, 1, 0.25), (0.25, 1, 1, 1, 1), (1, 0.3, 1, 0.25)])
def test_a_worker_slower_than_the_patience_is_waited_for_once_it_is_known(
    all_reduce: AllReduce, speeds: tuple[float, ...]
) -> None:
    """The others wait 1.5 s for the slowest where 0.6 s is the patience: of every round, were that all."""
    run = cluster(DiLoCo(period=10, all_reduce=all_reduce), steps=200, speeds=speeds, patience_s=0.6)
    outcome = simulate(run)
    everybody = tuple(range(len(speeds)))
    said = outcomes(outcome)
    assert said[:1] == [{("skipped", everybody)}]
    assert said[5:] == [{("committed", everybody)}] * 15
    assert all_equal(outcome)


def test_steps_that_vary_do_not_make_a_slow_worker_late_again() -> None:
    outcome = simulate(cluster(DiLoCo(period=10), steps=400, speeds=(1, 0.25), patience_s=0.6, jitter=0.3, seed=1))
    assert outcomes(outcome)[5:] == [{("committed", (0, 1))}] * 35


def test_a_link_cut_between_the_living_costs_the_patience_a_round() -> None:
    cut = {"from_s": 5.0, "until_s": 40.0, "side": [0], "other_side": [1]}
    outcome = simulate(cluster(DiLoCo(period=10), 3, steps=400, patience_s=2.0, network={"partitions": [cut]}))
    mine = [records[0] for records in rounds(outcome).values()]
    skipped = [record.time_s for record in mine if record.outcome == "skipped"]
    round_s = 10 * STEP_S + 2.0
    assert 5.0 + 2.0 < skipped[0] < 5.0 + round_s + EXCHANGE_S
    assert all(round_s <= after - before < round_s + EXCHANGE_S for before, after in pairwise(skipped))
    assert 40.0 - round_s < skipped[-1] < 40.0 + round_s
    assert mine[-1].outcome == "committed"


def test_a_cut_link_to_a_worker_known_as_slow_soon_costs_no_more_than_the_patience() -> None:
    cut = {"from_s": 50.0, "until_s": 200.0, "side": [0], "other_side": [1]}
    rule = DiLoCo(period=10)
    outcome = simulate(cluster(rule, steps=600, speeds=(1, 0.25), patience_s=0.6, network={"partitions": [cut]}))
    mine = [records[0] for records in rounds(outcome).values()]
    skipped = [record.time_s for record in mine if record.time_s > cut["from_s"] and record.outcome == "skipped"]
    assert len(skipped) > 10
    for before, after in pairwise(skipped[2:]):
        assert after - before < 10 * STEP_S + 0.6 + EXCHANGE_S


def test_over_sockets_a_worker_slower_than_the_patience_is_waited_for(tmp_path: Path) -> None:
    """A phase is 0.05 s and 0.8 s. Were nobody ever waited for longer than 0.4 s, no round would be of both."""
    run = Run(
        rule=DiLoCo(period=Every(period=5)),
        steps=35,
        batch_size=1,
        evaluate_every=0,
        patience_s=0.4,
        task={"name": "dawdling:Dawdling", "hurry": str(tmp_path / "never"), "step_s": 0.01},
        inner=SGD(lr=0.1),
        fleet=Fleet(workers=(WorkerGroup(), WorkerGroup(speed=1 / 16))),
    )
    assert {("committed", (0, 1))} in outcomes(train_here(run))
