"""Gradient coding (arXiv 1612.03301) and SR-SGC (arXiv 2211.13802): exact gradients whoever is late."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cluster import NET, all_equal, cluster, crash, drive, outcomes, quadratic, replicas, short
from plain import NOISY, Plain, close
from sockets import train_here
from test_m_sgc import patterns
from torch import Tensor

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.journal import Trained
from decentral.peer import Peer
from decentral.protocols import DDP, SRSGC, GradientCoding, Int8, OuterSGD
from decentral.protocols.codecs import E3M0, Codec, TopK
from decentral.protocols.gradient_codes import code_matrix, decoding
from decentral.replica import BatchId
from decentral.sim.simulate import simulate

CODES = [(5, 1), (6, 2), (8, 3), (4, 1), (7, 2), (9, 2), (4, 0), (3, 2)]


# -- the codes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "stragglers"), CODES)
def test_every_set_of_stragglers_leaves_the_sum_of_all_gradients(workers: int, stragglers: int) -> None:
    code = code_matrix(workers, stragglers, seed=0)
    gradients = torch.randn(workers, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pushes = code @ gradients
    for came in itertools.combinations(range(workers), workers - stragglers):
        weights = decoding(code, came)
        assert weights is not None
        total = torch.stack([weight * pushes[worker] for worker, weight in weights.items()]).sum(dim=0)
        assert torch.allclose(total, gradients.sum(dim=0), atol=1e-9)


@pytest.mark.parametrize(("workers", "stragglers"), CODES)
def test_every_worker_computes_one_gradient_more_than_there_are_stragglers(workers: int, stragglers: int) -> None:
    code = code_matrix(workers, stragglers, seed=0)
    assert ((code != 0).sum(dim=1) == stragglers + 1).all()
    assert (code.diagonal() == 1).all()


def test_rounding_errors_stay_small_however_many_workers_there_are() -> None:
    """Of float32 gradients the mean comes back to about float32's accuracy."""
    gradients = torch.randn(50, 1000, generator=torch.Generator().manual_seed(1))
    code = code_matrix(50, 2, seed=0)
    pushes = code.float() @ gradients
    weights = decoding(code, [worker for worker in range(50) if worker not in (3, 49)])
    assert weights is not None
    total = sum(weight * pushes[worker] for worker, weight in weights.items())
    assert torch.allclose(total, gradients.sum(dim=0), atol=1e-4)


def test_too_few_pushes_never_decode_to_a_wrong_sum() -> None:
    assert decoding(code_matrix(5, 1, 0), (0, 1, 2)) is None  # one of a random group of three
    assert decoding(code_matrix(5, 1, 0), (1, 2, 4)) is not None
    assert decoding(code_matrix(6, 2, 0), (0, 1, 2)) is None  # all of one group
    assert decoding(code_matrix(6, 2, 0), (1, 4)) == pytest.approx({1: 1, 4: 1})  # one of each group is enough
    assert decoding(code_matrix(4, 1, 0), ()) is None


# -- gradients of other workers' batches ------------------------------------------------------------------------------


async def gradients_of_worker_1(peer: Peer) -> tuple[Tensor, float]:
    began = peer.now()
    async for _ in peer.backward([((0, peer.layout.size),)], BatchId(1, 3)):
        pass
    return peer.grads.clone(), peer.now() - began


def test_a_gradient_of_anothers_batch_is_the_one_that_it_has_and_takes_a_step_of_time() -> None:
    found = drive(gradients_of_worker_1, 3, task=NOISY)
    run = cluster(DDP(), 3, task=NOISY)
    expected = Plain(run).gradient(1, 3, Plain(run).start())
    for gradient, seconds in found.values():
        assert close(gradient, expected)
        assert seconds == pytest.approx(run.fleet.step_time_s)


# -- the rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stragglers", "speeds"),
    [
        (1, (1, 1, 1, 1)),
        (1, (1, 1, 1, 0.3)),
        (1, (0.2, 1, 1, 1, 1)),
        (2, (1, 0.5, 0.9, 0.8, 0.3)),
        (2, (1, 0.1, 1, 1, 0.2, 1)),
    ],
)
def test_it_is_data_parallel_whoever_is_late(stragglers: int, speeds: tuple[float, ...]) -> None:
    coded = simulate(cluster(GradientCoding(stragglers=stragglers), steps=15, speeds=speeds, task=NET))
    plain = simulate(cluster(DDP(), steps=15, speeds=speeds, task=NET))
    assert all_equal(coded)
    assert torch.allclose(replicas(coded), replicas(plain), atol=2e-6)


def test_both_worlds_come_to_the_same() -> None:
    run = cluster(GradientCoding(), 3, 6, task=NET)
    assert torch.allclose(replicas(train_here(run)), replicas(simulate(run)), atol=1e-6)


def test_a_straggler_does_not_hold_up_the_others() -> None:
    """A round takes the quick workers (s + 1) gradients, not the slow one's single one."""
    speeds = (1, 1, 1, 0.1)
    coded = simulate(cluster(GradientCoding(), steps=30, speeds=speeds))
    assert coded.seconds < 0.5 * simulate(cluster(DDP(), steps=30, speeds=speeds)).seconds
    trained = [record for record in coded.records if isinstance(record, Trained)]
    samples = [sum(record.samples for record in trained if record.worker == worker) for worker in range(4)]
    assert samples[:3] == [30] * 3
    assert 0 < samples[3] < 30 / 5  # the rounds that it has missed are its steps, but it trained on nothing in them


def delayed_descent(run: Run, rounds: int, delay: int) -> Tensor:
    """x_(t+1) = x_t - 0.1 grad F(x_(t-B)), the mean over all workers, on float64 tensors."""
    plain = Plain(run)
    points = [plain.start()]
    for number in range(rounds):
        point, job = points[-1], number - delay
        if job >= 0:
            point = point - 0.1 * sum(plain.gradient(worker, job, points[job]) for worker in plain.workers) / 4
        points.append(point)
    return points[-1]


@pytest.mark.parametrize("speeds", [(1, 1, 1, 1), (1, 0.9, 0.8, 0.3), (0.2, 1, 1, 1), (1, 0.35, 1, 0.3)], ids=str)
@pytest.mark.parametrize("fields", [{"burst": 1, "window": 3}, {"burst": 2, "window": 3}], ids=str)
def test_sr_sgc_is_delayed_descent_whoever_is_late(fields: dict[str, Any], speeds: tuple[float, ...]) -> None:
    rule = SRSGC(stragglers=2, outer=OuterSGD(lr=0.1), **fields)
    run = cluster(rule, steps=20, task=NOISY, speeds=speeds)
    outcome = simulate(run)
    assert all_equal(outcome)
    assert outcomes(outcome, "server 0").count({("skipped", ())}) == 0
    assert close(outcome.params[0], delayed_descent(run, 20 + rule.delay, rule.delay))


@pytest.mark.parametrize(("burst", "window", "stragglers"), [(1, 2, 3), (1, 3, 2), (2, 3, 1), (2, 5, 3), (3, 4, 4)])
def test_stragglers_as_the_model_has_them_leave_the_sum_b_rounds_later(
    burst: int, window: int, stragglers: int
) -> None:
    """Rounds in plain sets: who is late delivers nothing; of v who still owe the due job, v - s do it again."""
    everybody, coded_for = set(range(6)), SRSGC(burst=burst, window=window, stragglers=stragglers).tolerated(6)
    code = code_matrix(6, coded_for, seed=0)
    for seed in range(10):
        late = patterns(seed, burst, window, stragglers)
        came: list[set[int]] = [set() for _ in late]
        for number, missing in enumerate(late):
            due = number - burst
            lacking = sorted(everybody - came[due]) if due >= 0 else []
            again = lacking[: max(0, len(lacking) - coded_for)]
            for worker in everybody - missing:
                came[due if worker in again else number].add(worker)
            assert due < 0 or decoding(code, came[due]) is not None


def test_sr_sgc_codes_for_as_many_stragglers_as_the_formula_says() -> None:
    """(B, W, lambda) = (2, 3, 23) needs s = ceil(46 / 4) = 12 of 256 workers."""
    assert SRSGC(burst=2, window=3, stragglers=23).tolerated(256) == 12
    assert SRSGC(burst=1, window=3, stragglers=1).tolerated(4) == 1


def test_workers_that_leave_are_stragglers_up_to_s_and_then_rounds_are_skipped() -> None:
    one = simulate(cluster(GradientCoding(), 4, 30, events=[crash(1.0, 3)]))
    whole = simulate(cluster(GradientCoding(), 4, 30))
    assert torch.allclose(one.params[0], whole.params[0], atol=1e-6)  # the dead worker's data are still there
    run = cluster(GradientCoding(), 4, 30, events=[crash(1.0, 3), crash(1.2, 2)])
    two = simulate(run)
    assert [found for ((found, _),) in outcomes(two, "server 0")][-1] == "skipped"
    assert all_equal(two)
    assert (two.params[0] - quadratic(run).optimum(4)).norm() < (torch.ones(16) - quadratic(run).optimum(4)).norm()


def test_when_the_server_dies_the_next_one_goes_on() -> None:
    outcome = simulate(cluster(GradientCoding(), 4, 30, events=[crash(1.0, 0)], detection_s=0.5))
    assert sorted(outcome.params) == [1, 2, 3]
    assert all_equal(outcome)
    committed = outcomes(outcome, "server 0") + outcomes(outcome, "server 1")
    assert 25 < len(committed) <= 30
    assert outcome.after["loss"] < 0.6 * outcome.before["loss"]


@pytest.mark.parametrize("codec", [Int8(block=8), E3M0()], ids=short)
def test_coarse_pushes_train_too(codec: Codec) -> None:
    outcome = simulate(cluster(GradientCoding(codec=codec), 4, 20))
    assert outcome.after["loss"] < 0.7 * outcome.before["loss"]


@pytest.mark.parametrize("rule", [GradientCoding(), SRSGC()], ids=lambda rule: rule.name)
def test_time_alone(rule: GradientCoding) -> None:
    run = cluster(rule, steps=20, speeds=(1, 0.6, 0.9, 0.3))
    assert simulate(run, timing_only=True).seconds == simulate(run).seconds


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rule\.stragglers: 1 of 1 workers"):
        GradientCoding().check(1)
    with pytest.raises(ConfigError, match=r"rule\.codec: 'topk'"):
        GradientCoding(codec=TopK()).check(4)
    with pytest.raises(ConfigError, match=r"rule\.burst: 2 does not divide window - 1 = 3"):
        SRSGC(burst=2, window=4).check(4)
