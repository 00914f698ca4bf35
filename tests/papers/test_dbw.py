"""Dynamic backup workers (arXiv 2004.14696): how many pushes a round waits for."""

from __future__ import annotations

import heapq
import itertools

import pytest
import torch
from cluster import NET, all_equal, cluster, crash, replicas, rounds, short
from plain import NOISY, Plain, close
from test_async_local_sgd import QUICK
from torch import Tensor

from decentral.config import Run
from decentral.journal import Trained
from decentral.protocols import DDP, DiLoCo, DynamicBackupWorkers, Int8, OuterSGD
from decentral.protocols.codecs import E3M0, Codec
from decentral.protocols.dbw import _Known, best_quorum
from decentral.sim.simulate import simulate


@pytest.mark.parametrize(("a", "b", "quorum"), [(1, 0.5, 1), (1, 0.9, 2), (1, 2, 4)])
def test_the_best_quorum_of_16_workers_with_exponential_times(a: float, b: float, quorum: int) -> None:
    times = list(itertools.accumulate(1 / (16 - count) for count in range(16)))
    assert best_quorum([a - b / count for count in range(1, 17)], times) == quorum


def test_equal_times_and_no_gain_mean_everybody() -> None:
    assert best_quorum([1 - 0.5 / count for count in range(1, 9)], [3.0] * 8) == 8
    assert best_quorum([-1.0 / count for count in range(1, 9)], [1.0 * count for count in range(1, 9)]) == 8
    assert best_quorum([1.0, 1.0], [5.0, 2.0]) == 2  # a later push cannot have come earlier


def test_estimates_of_norm_variance_and_curvature_are_unbiased() -> None:
    """Of gradients (signal + noise) of a quadratic of curvature 0.7, with 5 pushes a round."""
    generator = torch.Generator().manual_seed(0)
    size, sigma, curvature, lr = 400, 0.5, 0.7, 0.2
    norms, variances, curvatures = [], [], []
    for _ in range(100):
        known, x = _Known(lr), torch.ones(size)
        for _ in range(2):
            values = [curvature * x + sigma * torch.randn(size, generator=generator) for _ in range(5)]
            gradient = torch.stack(values).mean(dim=0)
            known.saw(gradient, values)
            x = x - lr * gradient
        norms.append(known._rounds[0][0])
        variances.append(known._rounds[0][1])
        curvatures.append(known._curvatures[0])
    assert sum(norms) / 100 == pytest.approx(curvature**2 * size, rel=0.02)
    assert sum(variances) / 100 == pytest.approx(sigma**2 * size, rel=0.02)
    assert sum(curvatures) / 100 == pytest.approx(curvature, rel=0.1)


def test_the_first_round_waits_for_everybody_as_diloco_does() -> None:
    dynamic = simulate(cluster(DynamicBackupWorkers(period=4, lr=0.7), 4, 4, task=NOISY))
    synchronous = simulate(cluster(DiLoCo(period=4, outer=OuterSGD(lr=0.7)), 4, 4, task=NOISY))
    assert torch.allclose(replicas(dynamic), replicas(synchronous), atol=1e-6)


def test_with_equal_times_every_round_waits_for_everybody_and_steps_are_data_parallel() -> None:
    """No push comes later than another, so to wait for all costs nothing."""
    dynamic = simulate(cluster(DynamicBackupWorkers(), 4, 20, task=NET, **QUICK))
    assert [records[0].members for records in rounds(dynamic, "server 0").values()] == [(0, 1, 2, 3)] * 20
    parallel = simulate(cluster(DDP(), 4, 20, task=NET))
    assert torch.allclose(replicas(dynamic), replicas(parallel), atol=2e-6)


def reference(run: Run, speeds: tuple[float, ...], quorums: list[int]) -> tuple[list[tuple[int, ...]], Tensor]:
    """Who came in time in each round of two local steps, and the model, given how many each round waits for."""
    plain, period = Plain(run), 2
    model, version, held, came = plain.start(), 0, {}, []
    began = dict.fromkeys(plain.workers, (model, 0))
    done = dict.fromkeys(plain.workers, 0)
    events = [(period * run.fleet.step_time_s / speed, worker) for worker, speed in enumerate(speeds)]
    heapq.heapify(events)
    while version * period < run.steps:
        now, worker = heapq.heappop(events)
        start, start_version = began[worker]
        push = start - plain.sgd(worker, range(done[worker], done[worker] + period), start, 0.1)
        again = [worker] if start_version < version else []
        if not again:
            held[worker] = push
        active = {each for _, each in events} | set(held) | set(again)
        if len(held) == quorums[version] or not active - set(held):
            model, version = model - 0.9 * sum(held.values()) / len(held), version + 1
            came.append(tuple(sorted(held)))
            again += list(held)
            held = {}
        for each in again:
            began[each], done[each] = (model, version), version * period  # steps of rounds that it missed included
            heapq.heappush(events, (now + period * run.fleet.step_time_s / speeds[each], each))
    return came, model


def test_it_equals_the_reference_given_its_choices() -> None:
    speeds = (1.0, 0.93, 0.83, 0.31)
    run = cluster(DynamicBackupWorkers(period=2, lr=0.9), steps=24, task=NOISY, speeds=speeds, **QUICK)
    outcome = simulate(run)
    members = [records[0].members for records in rounds(outcome, "server 0").values()]
    assert {len(each) for each in members} > {4}
    came, model = reference(run, speeds, [len(each) for each in members])
    assert came == members
    assert close(outcome.params[0], model)


def test_a_straggler_does_not_hold_up_the_others() -> None:
    speeds = (1.0, 1.0, 1.0, 0.05)
    run = cluster(DynamicBackupWorkers(period=2, lr=0.2), steps=40, speeds=speeds, task=NET)
    outcome = simulate(run)
    members = [len(records[0].members) for records in rounds(outcome, "server 0").values()]
    assert members[0] == 4
    assert members.count(4) < len(members) / 2
    assert all_equal(outcome)


def test_who_misses_rounds_has_missed_their_steps_and_never_pushes_alone_at_the_end() -> None:
    speeds = (1.0, 1.0, 1.0, 0.05)
    run = cluster(DynamicBackupWorkers(period=2, lr=0.2), steps=40, speeds=speeds, task=NET, **QUICK)
    outcome = simulate(run)
    members = [records[0].members for records in rounds(outcome, "server 0").values()]
    assert len(members) == 20  # of two steps each, for everybody
    assert members[-1] == (0, 1, 2)
    assert {left.step for left in outcome.left()} == {40}
    trained = [record for record in outcome.records if isinstance(record, Trained)]
    done = [sum(record.samples for record in trained if record.worker == worker) for worker in range(4)]
    assert done[:3] == [40] * 3
    assert done[3] < 10
    phase = 2 * run.fleet.step_time_s / 0.05  # which is under way at the end
    last_round = max(records[0].time_s for records in rounds(outcome, "server 0").values())
    assert outcome.seconds <= last_round + phase


@pytest.mark.parametrize("at_s", [0.7, 1.9, 3.1])
def test_when_the_server_dies_all_end_together_too(at_s: float) -> None:
    """Worker 1, which serves then, is a straggler: what it has missed is no reason to go on without the others."""
    run = cluster(
        DynamicBackupWorkers(period=2, lr=0.3), steps=80, speeds=(1, 0.2, 1, 1), task=NOISY, events=[crash(at_s, 0)]
    )
    outcome = simulate(run)
    assert sorted(outcome.params) == [1, 2, 3]
    assert all_equal(outcome)
    assert {left.step for left in outcome.left() if left.worker} == {80}
    last = list(rounds(outcome, "server 1").values())[-1][0]
    assert {2, 3} <= set(last.members)


def test_a_worker_that_leaves_is_not_waited_for() -> None:
    outcome = simulate(cluster(DynamicBackupWorkers(period=2), 3, 40, events=[crash(0.6, 2)]))
    assert sorted(outcome.params) == [0, 1]
    assert all_equal(outcome)


@pytest.mark.parametrize("codec", [Int8(block=8), E3M0()], ids=short)
def test_coarse_pushes_train_too(codec: Codec) -> None:
    outcome = simulate(cluster(DynamicBackupWorkers(period=4, codec=codec), 3, 40))
    assert outcome.after["loss"] < 0.8 * outcome.before["loss"]


def test_time_alone_is_that_of_rounds_of_everybody() -> None:
    run = cluster(DynamicBackupWorkers(period=5), 3, 20)
    assert simulate(run, timing_only=True).seconds == pytest.approx(simulate(run).seconds, rel=0.3)
