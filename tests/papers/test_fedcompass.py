"""FedCompass (arXiv 2309.14675): local steps by speed, so that groups of workers arrive together."""

from __future__ import annotations

import pytest
import torch
from cluster import NET, all_equal, cluster, crash, rounds, short
from plain import NOISY, Plain, close

from decentral.journal import Synced, Trained
from decentral.outcome import Outcome
from decentral.protocols import FedCompass, Int8
from decentral.protocols.codecs import E3M0, Codec
from decentral.protocols.fedcompass import Group
from decentral.sim.simulate import simulate


def arrivals(outcome: Outcome) -> dict[int, list[float]]:
    """Return when each worker's phases ended."""
    ended: dict[int, list[float]] = {}
    for record in outcome.records:
        if isinstance(record, Trained):
            ended.setdefault(record.worker, []).append(record.time_s)
    return ended


def phases(outcome: Outcome) -> dict[int, list[int]]:
    steps: dict[int, list[int]] = {}
    for record in outcome.records:
        if isinstance(record, Trained):
            steps.setdefault(record.worker, []).append(record.steps)
    return steps


@pytest.mark.parametrize(("step_s", "steps"), [(2.0, 50), (1.0, 100), (5.0, 20), (0.5, 0), (0.9, 0), (6.0, 0)])
def test_who_can_meet_a_group_that_is_due_in_100_seconds(step_s: float, steps: int) -> None:
    """With 20 to 100 local steps; workers that are too quick or too slow for it find nothing."""
    group = Group(100.0, 150.0, {1})
    assert FedCompass().fitting([group], 0.0, step_s) == (steps, group if steps else None)


def test_a_worker_joins_the_group_with_the_most_steps_and_else_begins_one_that_others_can_meet() -> None:
    rule = FedCompass()
    near, far = Group(60.0, 90.0, {0}), Group(90.0, 135.0, {1})
    assert rule.fitting([near, far], 0.0, 1.0) == (90, far)
    assert rule.leading([], 0.0, 2, {2: 4.0}) == 100
    # Group `near` goes on until 90; its quickest, 1 s a step, may then do 100 steps: until 190.
    assert rule.leading([near], 0.0, 2, {0: 1.0, 2: 4.0}) == 47
    assert rule.leading([near], 0.0, 2, {0: 1.0, 2: 20.0}) == 20  # at least Qmin


def test_at_constant_speeds_groups_arrive_together() -> None:
    speeds = (1.0, 0.6, 0.3)
    outcome = simulate(cluster(FedCompass(period=40), steps=300, speeds=speeds))
    pushed = [record for record in outcome.records if isinstance(record, Synced) and len(record.members) == 3]
    pushed = [record for record in pushed if record.time_s < 0.05 * 300]  # then the quickest has spent its budget
    assert len(pushed) >= 3
    ended = arrivals(outcome)
    for record in pushed:
        last = [max(time for time in ended[worker] if time <= record.time_s + 1e-9) for worker in range(3)]
        assert max(last) - min(last) <= 0.05 / min(speeds) + 0.2  # a step of the slowest, and transfers
    assert all(8 <= steps <= 40 for worker in range(3) for steps in phases(outcome)[worker][1:-1])


def test_without_a_choice_of_steps_it_is_a_buffered_asynchronous_server() -> None:
    outcome = simulate(cluster(FedCompass(period=10, ratio=1), steps=60, speeds=(1.0, 0.6, 0.3)))
    assert all(steps == [10] * 6 for steps in phases(outcome).values())


def test_one_worker_is_lookahead() -> None:
    """Every push is an update: model <- model - alpha Delta."""
    run = cluster(FedCompass(period=10, ratio=2, alpha=0.6), 1, 25, task=NOISY)
    plain = Plain(run)
    model = plain.start()
    for steps in (range(5), range(5, 15), range(15, 25)):
        model = model + 0.6 * (plain.sgd(0, steps, model, 0.1) - model)
    assert close(simulate(run).params[0], model)


def test_first_pushes_are_updates_of_their_own_and_then_groups_are() -> None:
    """Workers of equal speed: n workers share alpha, and who comes later is staler."""
    run = cluster(FedCompass(period=10, ratio=2), 3, 5, task=NOISY)
    plain = Plain(run)
    model = plain.start()
    for staleness, worker in enumerate(plain.workers):
        change = plain.start() - plain.sgd(worker, range(5), plain.start(), 0.1)
        model = model - 0.9 / 3 * (1 + staleness) ** -0.5 * change
    assert close(simulate(run).params[0], model)
    longer = simulate(cluster(FedCompass(period=10, ratio=2), 3, 25, task=NOISY))
    members = [records[0].members for records in rounds(longer, "server 0").values()]
    assert members[:4] == [(0,), (1,), (2,), (0, 1, 2)]


def test_a_group_does_not_wait_for_the_dead_for_ever() -> None:
    run = cluster(FedCompass(period=20), 3, 200, task=NET, speeds=(1, 0.6, 0.3), events=[crash(4.0, 2)])
    outcome = simulate(run)
    assert sorted(outcome.params) == [0, 1]
    assert all_equal(outcome)
    assert outcome.seconds < 25


@pytest.mark.parametrize("codec", [Int8(block=8), E3M0()], ids=short)
def test_coarse_pushes_come_near_to_exact_ones(codec: Codec) -> None:
    exact, coarse = (simulate(cluster(FedCompass(period=10, codec=each), 3, 60)).params[0] for each in (Int8(), codec))
    assert (coarse - exact).norm() < 0.3 * (torch.ones(16) - exact).norm()


def test_time_alone() -> None:
    run = cluster(FedCompass(period=10), steps=60, speeds=(1, 0.6, 0.3))
    assert simulate(run, timing_only=True).seconds == simulate(run).seconds
