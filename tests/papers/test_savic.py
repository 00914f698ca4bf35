"""SAVIC (arXiv 2406.00846) against a reference on plain tensors, and what its shared metric promises."""

from __future__ import annotations

import pytest
import torch
from cluster import cluster, replicas
from plain import NOISY, Plain, close
from torch import Tensor

from decentral.config import Run
from decentral.inner import SGD
from decentral.protocols import SAVIC, LocalSGD
from decentral.sim.simulate import simulate


def reference(run: Run, period: int, beta: float, floor: float) -> tuple[Tensor, Tensor]:
    """SAVIC with Adam's beta_t on plain tensors: (x, D)."""
    plain = Plain(run)
    x, lr = plain.start(), run.inner.lr
    square, scale = torch.zeros_like(x), torch.ones_like(x)
    for number, first in enumerate(range(0, run.steps, period), 1):
        ends, gradients = [], []
        for worker in plain.workers:
            mine = x
            for step in range(first, min(first + period, run.steps)):
                gradient = plain.gradient(worker, step, mine)
                mine = mine - lr * gradient / scale
            ends.append(mine)
            gradients.append(gradient)
        x = torch.stack(ends).mean(dim=0)
        beta_t = (beta - beta**number) / (1 - beta**number)
        square = beta_t * square + (1 - beta_t) * torch.stack(gradients).mean(dim=0) ** 2
        scale = square.sqrt().clamp(min=floor)
    return x, scale


@pytest.mark.parametrize(
    ("workers", "period", "steps", "floor"), [(1, 3, 15, 0.05), (3, 3, 15, 0.05), (3, 3, 13, 0.5), (3, 1, 6, 0.05)]
)
def test_savic_equals_the_reference(workers: int, period: int, steps: int, floor: float) -> None:
    """With a round after every step it is data parallelism with a preconditioner."""
    rule = SAVIC(period=period, beta=0.7, alpha=floor)
    run = cluster(rule, workers, steps, task=NOISY, inner=SGD(lr=0.05), batch_size=2)
    outcome = simulate(run)
    x, scale = reference(run, period, 0.7, floor)
    assert close(outcome.params[0], x)
    assert torch.allclose(outcome.slots[0]["scale"].double(), scale, rtol=0, atol=2e-5)


def test_every_worker_has_the_same_metric() -> None:
    outcome = simulate(cluster(SAVIC(period=3, alpha=0.05), 3, 12, task=NOISY))
    for worker in (1, 2):
        assert torch.equal(outcome.slots[worker]["scale"], outcome.slots[0]["scale"])
        assert torch.equal(outcome.params[worker], outcome.params[0])
    assert not torch.equal(outcome.slots[1]["gradient"], outcome.slots[0]["gradient"])  # their data are their own


def test_where_no_gradient_exceeds_the_floor_of_one_it_is_local_sgd_bit_for_bit() -> None:
    scaled = simulate(cluster(SAVIC(period=3, alpha=1.0), 3, 11, task={**NOISY, "curvature": (0.01, 0.1)}))
    local = simulate(cluster(LocalSGD(period=3), 3, 11, task={**NOISY, "curvature": (0.01, 0.1)}))
    assert torch.equal(replicas(scaled), replicas(local))


def test_after_one_round_the_scale_is_the_size_of_the_mean_gradient() -> None:
    run = cluster(SAVIC(period=1, alpha=0.05), 3, 1, task=NOISY, batch_size=2)
    plain = Plain(run)
    mean = torch.stack([plain.gradient(worker, 0, plain.start()) for worker in plain.workers]).mean(dim=0)
    assert torch.allclose(simulate(run).slots[0]["scale"].double(), mean.abs().clamp(min=0.05), atol=1e-5)


def test_scaled_steps_do_not_know_the_curvature() -> None:
    """The first gradient is curvature x distance, so the second step goes the share lr / distance of the way."""
    task = {"name": "quadratic", "dimension": 8, "curvature": (0.01, 30.0), "spread": 0.0, "start": 2.0}
    before, after = (
        simulate(cluster(SAVIC(period=1, alpha=1e-6), 2, steps, task=task, inner=SGD(lr=0.01))).params[0]
        for steps in (1, 2)
    )
    assert before.max() - before.min() > 0.5
    assert torch.allclose(after / before, torch.full((8,), 1 - 0.01 / 2), atol=1e-6)
