"""FedSpeed (arXiv 2302.10429) against a reference on plain tensors, and where it stands still."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from cluster import NET, all_equal, cluster, crash, outcomes, replicas
from plain import NOISY, Plain, close
from torch import Tensor, nn

from decentral.config import Run
from decentral.outcome import Outcome
from decentral.protocols import FedSpeed, LocalSGD, SyncRule
from decentral.sim.simulate import simulate
from decentral.task import Task


def reference(run: Run, period: int, strength: float, radius: float) -> tuple[Tensor, Tensor]:
    """The equations on plain tensors: (anchor, h_i of each worker)."""
    plain = Plain(run)
    anchor = plain.start()
    held = [torch.zeros_like(anchor) for _ in plain.workers]
    for first in range(0, run.steps, period):
        ends = []
        for worker in plain.workers:
            x = anchor
            for step in range(first, min(first + period, run.steps)):
                g = plain.gradient(worker, step, x)
                uphill = plain.gradient(worker, step, x + radius * g / g.norm())
                x = x - run.inner.lr * (uphill + strength * (x - anchor + held[worker]))
            held[worker] = held[worker] + x - anchor
            ends.append(x + held[worker])
        anchor = torch.stack(ends).mean(dim=0)
    return anchor, torch.stack(held)


@pytest.mark.parametrize(("strength", "radius"), [(0.1, 0.1), (0.8, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize(("workers", "steps"), [(1, 12), (3, 22)])
def test_fedspeed_equals_the_reference(workers: int, steps: int, strength: float, radius: float) -> None:
    run = cluster(FedSpeed(period=5, strength=strength, radius=radius), workers, steps, task=NOISY, batch_size=2)
    outcome = simulate(run)
    anchor, held = reference(run, 5, strength, radius)
    assert all_equal(outcome)
    assert close(outcome.params[0], anchor)
    assert close(torch.stack([outcome.slots[worker]["held"] for worker in range(workers)]), held)


class Uneven(Task):
    """f_w(x) = a_w / 2 (x - c_w)^2: local SGD of several steps ends off the optimum sum a_w c_w / sum a_w."""

    name: ClassVar[str] = "uneven"

    def model(self) -> nn.Module:
        return nn.Linear(1, 1, bias=False)

    def batch(self, worker: int, start: int, size: int) -> Tensor:
        return torch.tensor([[0.5 + worker, float((-1) ** worker)]] * size)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        curvature, centre = batch.T
        loss: Tensor = (curvature / 2 * (next(model.parameters()).view(-1) - centre).square()).mean()
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float(self.loss(model, torch.cat([self.batch(worker, 0, 1) for worker in range(3)])))}


OPTIMUM = (0.5 - 1.5 + 2.5) / 4.5


def at_rest(rule: SyncRule) -> Outcome:
    return simulate(cluster(rule, 3, 600, task={"name": f"{__name__}:Uneven"}))


@pytest.mark.parametrize("period", [1, 5, 20])
def test_it_stands_still_at_the_optimum_however_long_the_phases(period: int) -> None:
    """There the corrections are the gradients and add up to zero."""
    outcome = at_rest(FedSpeed(period=period, strength=1.0, radius=0.0))
    assert float(outcome.params[0]) == pytest.approx(OPTIMUM, abs=1e-4)
    held = [float(outcome.slots[worker]["held"]) for worker in range(3)]
    gradients = [(0.5 + worker) * (OPTIMUM - (-1) ** worker) for worker in range(3)]
    assert held == pytest.approx([-gradient for gradient in gradients], abs=1e-3)
    assert sum(held) == pytest.approx(0, abs=1e-3)
    plain = float(at_rest(LocalSGD(period=period)).params[0])
    assert (abs(plain - OPTIMUM) > 0.01) == (period > 1)


def test_a_step_takes_the_time_of_its_gradients() -> None:
    two, one = (simulate(cluster(FedSpeed(period=4, radius=radius), 3, 20)) for radius in (0.1, 0.0))
    local = simulate(cluster(LocalSGD(period=4), 3, 20))
    assert one.seconds == pytest.approx(local.seconds)
    step_s = cluster(LocalSGD(), 3, 20).fleet.step_time_s
    assert two.seconds - one.seconds == pytest.approx(20 * step_s)


def test_the_gradient_is_taken_uphill_and_the_parameters_come_back() -> None:
    """With no learning to speak of, a look uphill leaves the parameters bit for bit."""
    run = cluster(FedSpeed(period=3, strength=0.0, radius=10.0), 2, 6, task=NET)
    tiny = run.model_copy(update={"inner": run.inner.model_copy(update={"lr": 1e-30})})
    start = simulate(tiny.model_copy(update={"steps": 1}))
    assert torch.equal(replicas(simulate(tiny)), replicas(start))


def test_who_dies_takes_its_correction_along() -> None:
    outcome = simulate(cluster(FedSpeed(period=3), 4, 30, events=[crash(2.0, 3)]))
    assert sorted(outcome.params) == [0, 1, 2]
    assert all_equal(outcome)
    assert {kind for ((kind, _),) in outcomes(outcome)} <= {"committed", "degraded"}
    assert outcome.after["loss"] < outcome.before["loss"]
