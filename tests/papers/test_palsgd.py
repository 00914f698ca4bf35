"""PALSGD (arXiv 2504.18454) against a reference on plain tensors and against DiLoCo."""

from __future__ import annotations

import random

import pytest
import torch
from cluster import NET, all_equal, cluster, replicas, rounds
from plain import NOISY, Plain, close
from torch import Tensor

from decentral.config import Run
from decentral.journal import Trained
from decentral.protocols import PALSGD, DiLoCo, OuterSGD
from decentral.replica import seed_of
from decentral.sim.simulate import simulate


def reference(run: Run, period: int, p: float, alpha: float) -> tuple[Tensor, int]:
    """PALSGD with outer Nesterov 0.7 / 0.9 on plain tensors, coin by coin: (anchor, pulls)."""
    plain = Plain(run)
    anchor = plain.start()
    b, pulls = torch.zeros_like(anchor), 0
    for first in range(0, run.steps, period):
        ends = []
        for worker in plain.workers:
            coin = random.Random(seed_of(run.seed, f"palsgd {worker}", first))
            x, step = anchor, first
            while step < min(first + period, run.steps):
                if coin.random() < p:
                    x = x - min(1.0, alpha * run.inner.lr / p) * (x - anchor)
                    pulls += 1
                else:
                    x = x - run.inner.lr * plain.gradient(worker, step, x)
                    step += 1
            ends.append(x)
        delta = anchor - torch.stack(ends).mean(dim=0)
        b = 0.9 * b + delta
        anchor = anchor - 0.7 * (delta + 0.9 * b)
    return anchor, pulls


@pytest.mark.parametrize(("p", "alpha"), [(0.3, 0.5), (0.7, 2.0), (0.05, 1.0)])
def test_palsgd_equals_the_reference(p: float, alpha: float) -> None:
    run = cluster(PALSGD(period=8, probability=p, alpha=alpha), 3, 30, task=NOISY, batch_size=2)
    outcome = simulate(run)
    anchor, pulls = reference(run, 8, p, alpha)
    assert pulls > 0
    assert all_equal(outcome)
    assert close(outcome.params[0], anchor)


def test_without_pulls_it_is_diloco_bit_for_bit() -> None:
    pulled = simulate(cluster(PALSGD(period=4, probability=0.0), 3, 14, task=NET))
    assert torch.equal(replicas(pulled), replicas(simulate(cluster(DiLoCo(period=4), 3, 14, task=NET))))


def test_pulls_cost_no_step_of_the_budget_and_all_workers_meet_at_the_same_steps() -> None:
    outcome = simulate(cluster(PALSGD(period=6, probability=0.5), 3, 20))
    assert outcome.samples() == 3 * 20
    assert len(rounds(outcome)) == 4
    ends = [{record.step for record in outcome.records if isinstance(record, Trained) and record.worker == worker}
            for worker in range(3)]  # fmt: skip
    assert all({6, 12, 18, 20} <= steps for steps in ends)
    assert ends[0] != ends[1]  # each has coins of its own


def test_pulls_hold_workers_closer_to_the_anchor() -> None:
    """One phase, outer SGD of 1: what is left of the local change shrinks as the pull grows."""
    moved = []
    for alpha in (0.0, 0.5, 5.0):
        rule = PALSGD(period=20, probability=0.4, alpha=alpha, outer=OuterSGD())
        moved.append(float((simulate(cluster(rule, 2, 20)).params[0] - 1).norm()))
    assert moved[0] > moved[1] > moved[2]
