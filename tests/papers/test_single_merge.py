"""Single global merging (arXiv 2507.06542): sparse pairs, one complete average at the end, and what it gains."""

from __future__ import annotations

import math

import pytest
import torch
from cluster import STILL, all_equal, apart, cluster, outcomes, quadratic, replicas, rounds, spread, watched

from decentral.journal import Synced
from decentral.protocols import SingleMerge
from decentral.sim.simulate import simulate


@pytest.mark.parametrize("rate", [0.0, 0.2, 1.0])
def test_there_is_exactly_one_complete_merge_and_it_comes_last(rate: float) -> None:
    outcome = simulate(cluster(SingleMerge(period=5, rate=rate), 5, 30))
    assert outcomes(outcome) == [{("committed", (0, 1, 2, 3, 4))}]
    last = [record for record in outcome.records if isinstance(record, Synced)][-5:]
    assert {record.channel for record in last} == {"sync"}
    assert all_equal(outcome)


def test_the_merge_is_the_mean_of_what_the_workers_had() -> None:
    watch = watched(5)
    outcome = simulate(cluster(SingleMerge(period=watch, rate=0.5), 4, 30))
    before = watch.history()[-1]
    assert spread(before) > 0.01
    assert torch.allclose(outcome.params[0], before.mean(dim=0), atol=1e-6)


def test_the_number_of_exchanges_is_binomial() -> None:
    """Each of 4 pairs in each of the first 79 rounds, with probability 0.2: within 4 standard deviations."""
    outcome = simulate(cluster(SingleMerge(period=1), 8, 80, task={**STILL, "dimension": 2}))
    pairs = {(record.round, record.members) for records in rounds(outcome, "pair").values() for record in records}
    tries = 4 * 79
    assert abs(len(pairs) - 0.2 * tries) < 4 * math.sqrt(tries * 0.2 * 0.8)
    assert all(len(members) == 2 for _, members in pairs)
    both = [record for records in rounds(outcome, "pair").values() for record in records]
    assert len(both) == 2 * len(pairs)


def test_pairs_decide_independently() -> None:
    """With R = 1/2 the pairs of a round are not all on or all off together."""
    outcome = simulate(cluster(SingleMerge(period=1, rate=0.5), 8, 20, task={**STILL, "dimension": 2}))
    active = [len(records) // 2 for records in rounds(outcome, "pair").values()]
    assert set(active) & {1, 2, 3}


def test_no_exchange_is_wasted_right_before_the_merge() -> None:
    outcome = simulate(cluster(SingleMerge(period=5, rate=1.0), 4, 30))
    assert list(rounds(outcome, "pair")) == [1, 2, 3, 4, 5]


def test_merging_gains_half_the_trace_of_hessian_times_covariance() -> None:
    """On a quadratic: mean_k L(theta_k) - L(mean theta) = 1/2 Tr(H Gamma), exactly."""
    watch = watched(5)
    run = cluster(apart(SingleMerge(period=watch, rate=0.3)), 6, 25, task={"name": "quadratic", "eval_workers": 6})
    outcome = simulate(run)
    task = quadratic(run)
    curvature, centres = task.curvatures().double(), torch.stack([task.centre(k) for k in range(6)]).double()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (curvature * (x.double() - centres).square()).sum(dim=1).mean()

    before = watch.history()[-1].double()
    deviation = before - before.mean(dim=0)
    gamma = deviation.T @ deviation / len(before)
    gain = torch.stack([loss(theta) for theta in before]).mean() - loss(outcome.params[0])
    assert gain.item() == pytest.approx(0.5 * (curvature.diag() @ gamma).trace().item(), rel=1e-5)
    assert outcome.after["loss"] == pytest.approx(loss(outcome.params[0]).item(), rel=1e-5)


def test_without_exchanges_it_is_a_soup_of_separate_runs() -> None:
    run = cluster(SingleMerge(period=10, rate=0.0), 4, 40)
    task = quadratic(run)
    soup = torch.stack([task.after_sgd(worker, 0.1, 40) for worker in range(4)]).mean(dim=0)
    assert torch.allclose(replicas(simulate(run))[2], soup, atol=1e-6)
