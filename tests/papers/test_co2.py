"""CO2 (arXiv 2401.16265) against a reference on plain tensors, its synchronous rule, and the clock."""

from __future__ import annotations

import pytest
import torch
from cluster import NET, all_equal, cluster, outcomes, quadratic, replicas, rounds
from plain import NOISY, Plain, close
from torch import Tensor

from decentral.config import Run
from decentral.protocols import CO2, DiLoCo, LocalSGD, OuterSGD
from decentral.protocols.co2 import staleness
from decentral.sim.simulate import simulate


def reference(run: Run, tau: int, alpha: float, beta: float, phi: float) -> tuple[Tensor, list[float]]:
    """CO2 on plain tensors: the final parameters, and every staleness gap."""
    plain = Plain(run)
    starts, changes, gaps = [plain.start()], [], []
    m = torch.zeros_like(starts[0])

    def take(change: Tensor, begun: Tensor, now: Tensor) -> Tensor:
        nonlocal m
        gaps.append(max(1.0, float((now - begun).norm() / change.norm())))
        m = (beta * m + change / gaps[-1]).clamp(-phi, phi)
        return now - alpha * m

    for first in range(0, run.steps, tau):
        steps = range(first, min(first + tau, run.steps))
        ends = [plain.sgd(worker, steps, starts[-1], run.inner.lr) for worker in plain.workers]
        changes.append(starts[-1] - torch.stack(ends).mean(dim=0))
        starts.append(take(changes[-2], starts[-2], starts[-1]) if len(changes) > 1 else starts[-1])
    return take(changes[-1], starts[-2], starts[-1]), gaps


@pytest.mark.parametrize(("workers", "beta", "phi"), [(1, 0.0, 9.0), (3, 0.8, 9.0), (3, 0.8, 0.2)])
def test_co2_equals_the_reference(workers: int, beta: float, phi: float) -> None:
    run = cluster(CO2(period=4, alpha=0.9, beta=beta, clip=phi), workers, 26, task=NOISY, batch_size=2)
    outcome = simulate(run)
    final, gaps = reference(run, 4, 0.9, beta, phi)
    assert all_equal(outcome)
    assert close(outcome.params[0], final)
    if beta:
        assert max(gaps) > 1  # the penalty had something to do


def test_the_momentum_is_really_clipped() -> None:
    momentum = simulate(cluster(CO2(period=4, beta=0.8, clip=0.02), 3, 16, task=NOISY)).slots[0]["momentum"]
    assert momentum.abs().max() == pytest.approx(0.02)


@pytest.mark.parametrize("beta", [0.0, 0.6])
def test_without_overlap_and_clipping_it_is_its_synchronous_rule_bit_for_bit(beta: float) -> None:
    co2 = simulate(cluster(CO2(period=3, alpha=0.8, beta=beta, clip=None, overlap=False), 3, 11, task=NET))
    diloco = simulate(cluster(DiLoCo(period=3, outer=OuterSGD(lr=0.8, momentum=beta)), 3, 11, task=NET))
    assert torch.equal(replicas(co2), replicas(diloco))


def test_without_overlap_momentum_and_clipping_it_is_local_sgd_bit_for_bit() -> None:
    co2 = simulate(cluster(CO2(period=3, clip=None, overlap=False), 3, 11, task=NET))
    assert torch.equal(replicas(co2), replicas(simulate(cluster(LocalSGD(period=3), 3, 11, task=NET))))


def test_the_staleness_gap_is_the_ratio_of_lengths_and_never_below_one() -> None:
    origin, step = torch.zeros(4), torch.tensor([3.0, 0.0, 4.0, 0.0])
    assert staleness(step, origin, step / 2) == pytest.approx(2.0)
    assert staleness(step, origin, 7 * step) == 1.0
    assert staleness(step, origin, origin) == 1.0
    assert staleness(origin, origin, step) == 1.0


def test_transfers_cost_no_time_as_long_as_they_are_shorter_than_a_phase() -> None:
    """Six phases of 5 x 0.05 s; a round takes less than a phase, and only the last one shows."""
    task = {"name": "quadratic", "dimension": 250_000, "curvature": (1.0, 1.0)}
    waiting, hidden = (
        simulate(cluster(CO2(period=5, overlap=overlap), 3, 30, task=task), timing_only=True).seconds
        for overlap in (False, True)
    )
    transfer = (waiting - 1.5) / 6
    assert 0.1 < transfer < 0.25
    assert hidden == pytest.approx(1.5 + transfer, rel=1e-6)


def test_what_skipped_rounds_do_not_deliver_is_kept_for_the_next() -> None:
    """A patience shorter than the network's latency skips all rounds: nobody moves, and nothing is lost."""
    run = cluster(CO2(period=4), 3, 12, patience_s=0.001)
    outcome = simulate(run)
    assert outcomes(outcome) == [{("skipped", (0, 1, 2))}] * len(rounds(outcome)) == [{("skipped", (0, 1, 2))}] * 3
    task = quadratic(run)
    begin = torch.full((16,), task.start)
    for worker in range(3):
        assert torch.equal(outcome.params[worker], begin)
        change = begin - task.after_sgd(worker, 0.1, 4)
        assert torch.allclose(outcome.slots[worker]["sent"], 3 * change, atol=1e-5)
