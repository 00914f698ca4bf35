"""SlowMo (arXiv 1910.00643) against a reference on plain tensors, and against the rules it contains."""

from __future__ import annotations

import pytest
import torch
from cluster import NET, all_equal, cluster, replicas
from plain import NOISY, Plain, close
from torch import Tensor

from decentral.config import Run
from decentral.inner import SGD
from decentral.protocols import DDP, DiLoCo, Every, LocalSGD, OuterSGD, SlowMo
from decentral.sim.simulate import simulate


def reference(run: Run, tau: int, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """Algorithm 1 on plain tensors, each step with its own learning rate: (anchor, u)."""
    plain = Plain(run)
    anchor = plain.start()
    u = torch.zeros_like(anchor)
    rates = [run.inner.lr_at(step, run.steps) for step in range(run.steps)]
    for first in range(0, run.steps, tau):
        steps = range(first, min(first + tau, run.steps))
        ends = []
        for worker in plain.workers:
            x = anchor
            for step in steps:
                x = x - rates[step] * plain.gradient(worker, step, x)
            ends.append(x)
        gamma = rates[steps[-1]]
        u = beta * u + (anchor - torch.stack(ends).mean(dim=0)) / gamma
        anchor = anchor - alpha * gamma * u
    return anchor, u


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize(("workers", "steps"), [(1, 16), (3, 18)])
def test_slowmo_equals_the_reference(schedule: str, workers: int, steps: int) -> None:
    inner = SGD.model_validate({"lr": 0.1, "schedule": schedule})
    run = cluster(SlowMo(period=4, alpha=0.8, beta=0.6), workers, steps, task=NOISY, inner=inner, batch_size=2)
    outcome = simulate(run)
    anchor, u = reference(run, 4, alpha=0.8, beta=0.6)
    assert all_equal(outcome)
    assert close(outcome.params[0], anchor)
    assert torch.allclose(outcome.slots[0]["momentum"].double(), u, rtol=0, atol=5e-5)


def test_without_slow_momentum_it_is_local_sgd() -> None:
    slow = simulate(cluster(SlowMo(period=4, beta=0.0), 3, 14, task=NET))
    local = simulate(cluster(LocalSGD(period=4), 3, 14, task=NET))
    assert torch.allclose(replicas(slow), replicas(local), atol=1e-6)


def test_at_a_constant_learning_rate_it_is_diloco_with_outer_heavy_ball() -> None:
    slow = simulate(cluster(SlowMo(period=4, alpha=0.7, beta=0.6), 3, 14, task=NET))
    diloco = simulate(cluster(DiLoCo(period=4, outer=OuterSGD(lr=0.7, momentum=0.6)), 3, 14, task=NET))
    assert torch.allclose(replicas(slow), replicas(diloco), atol=1e-6)


def test_a_falling_learning_rate_lets_old_momentum_shrink_and_dilocos_not() -> None:
    inner = SGD(lr=0.2, schedule="cosine", final_lr_fraction=0.01)
    slow = simulate(cluster(SlowMo(period=4, beta=0.6), 3, 16, task=NET, inner=inner))
    diloco = simulate(cluster(DiLoCo(period=4, outer=OuterSGD(lr=1.0, momentum=0.6)), 3, 16, task=NET, inner=inner))
    assert (slow.params[0] - diloco.params[0]).abs().max() > 1e-3


def test_with_an_average_after_each_step_it_is_heavy_ball_on_the_mean_gradient() -> None:
    slow = simulate(cluster(SlowMo(period=1, beta=0.8), 4, 12, task=NET))
    heavy_ball = simulate(cluster(DDP(), 4, 12, task=NET, inner=SGD(lr=0.1, momentum=0.8)))
    assert torch.allclose(slow.params[0], heavy_ball.params[0], atol=2e-6)


def test_defaults_are_the_codes() -> None:
    rule = SlowMo()
    assert (rule.period, rule.alpha, rule.beta) == (Every(period=48), 1.0, 0.5)
