"""FedHyper (arXiv 2310.03156) against a reference on plain tensors, and its factor in closed form."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from cluster import NET, all_equal, cluster, replicas
from plain import NOISY, Plain, close
from torch import Tensor

from decentral.config import Run
from decentral.inner import SGD
from decentral.phantom import Phantom
from decentral.protocols import FedHyper, LocalSGD
from decentral.protocols.merge import cosine
from decentral.sim.simulate import simulate

Adapts = Literal["outer", "inner", "own"]


def product(x: Tensor, y: Tensor, normalise: bool) -> float:
    scale = float(x.norm() * y.norm()) if normalise else 1.0
    return float(x @ y) / scale if scale else 0.0


def reference(run: Run, period: int, adapts: str, limit: float, normalise: bool) -> tuple[Tensor, float]:
    """The equations on plain tensors: (anchor, a)."""
    plain, count = Plain(run), run.fleet.size
    anchor, last, a = plain.start(), torch.zeros(12, dtype=torch.float64), 1.0
    for first in range(0, run.steps, period):
        ends = []
        for worker in plain.workers:
            x, own, steps = anchor, 1.0, []
            for step in range(first, min(first + period, run.steps)):
                rate = run.inner.lr_at(step, run.steps) * {"outer": 1.0, "inner": a, "own": own}[adapts]
                steps.append(-rate * plain.gradient(worker, step, x))
                x = x + steps[-1]
                if len(steps) > 1:
                    growth = 1 + product(steps[-1], steps[-2], normalise)
                    growth += 0.1 * product(steps[-1], -last, normalise) / count
                    own = min(max(own * min(1.1, growth), 1 / limit), limit)
            ends.append(x)
        mean = anchor - torch.stack(ends).mean(dim=0)
        a = min(max(a + product(mean, last, normalise), 1 / limit), limit) if adapts != "own" else 1.0
        anchor, last = anchor - (a if adapts == "outer" else 1.0) * mean, mean
    return anchor, a


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("adapts", "limit"), [("outer", 3.0), ("inner", 10.0), ("own", 10.0), ("own", 1.3)])
@pytest.mark.parametrize(("workers", "schedule"), [(1, "constant"), (3, "cosine")])
def test_fedhyper_equals_the_reference(
    workers: int, schedule: str, adapts: Adapts, limit: float, normalise: bool
) -> None:
    rule = FedHyper(period=4, adapts=adapts, limit=limit, normalise=normalise)
    inner = SGD.model_validate({"lr": 0.02, "schedule": schedule})
    run = cluster(rule, workers, 26, task=NOISY, inner=inner, batch_size=4)
    outcome = simulate(run)
    anchor, a = reference(run, 4, adapts, limit, normalise)
    assert all_equal(outcome)
    assert close(outcome.params[0], anchor)
    assert float(outcome.slots[0]["factor"]) == pytest.approx(a, abs=1e-4)


@pytest.mark.parametrize("adapts", ["outer", "inner", "own"])
def test_without_room_it_is_local_sgd_bit_for_bit(adapts: Adapts) -> None:
    held = simulate(cluster(FedHyper(period=4, adapts=adapts, limit=1.0), 3, 14, task=NET))
    assert torch.equal(replicas(held), replicas(simulate(cluster(LocalSGD(period=4), 3, 14, task=NET))))


SLOPE: dict[str, Any] = {"name": "quadratic", "dimension": 4, "curvature": (1e-6, 1e-6), "spread": 1e5}
"""So far from the centre that the gradient stays what it is."""


@pytest.mark.parametrize("rounds", [1, 2, 4, 9])
def test_on_a_slope_the_factor_rises_by_the_square_of_the_update_until_its_limit(rounds: int) -> None:
    run = cluster(FedHyper(period=2, limit=1.5, normalise=False), 2, 2 * rounds, task=SLOPE)
    gradient = -1e-6 * run.make_task().optimum(2)  # type: ignore[attr-defined]
    square = float((2 * 0.1 * gradient).square().sum())
    assert 0 < square < 0.2
    factor = float(simulate(run).slots[0]["factor"])
    assert factor == pytest.approx(min(1.5, 1 + (rounds - 1) * square), rel=1e-3)


def test_where_updates_turn_about_the_factor_falls_to_its_floor() -> None:
    """In a bowl of curvature 18 a step of 0.1 goes past the centre, and on to the same side only if it is halved."""
    bowl = {"name": "quadratic", "dimension": 4, "curvature": (18.0, 18.0), "spread": 0.0}
    factors = [float(simulate(cluster(FedHyper(period=1), 2, n, task=bowl)).slots[0]["factor"]) for n in (1, 2)]
    assert factors == pytest.approx([1.0, 1 / 3])


def test_a_slow_learning_rate_is_made_up_for() -> None:
    """On a noiseless bowl, with a learning rate far below what would do, all three get further than local SGD."""
    bowl = {"name": "quadratic", "dimension": 8, "spread": 0.0}
    inner = SGD(lr=0.01)
    plain = simulate(cluster(LocalSGD(period=12), 3, 60, task=bowl, inner=inner)).after["loss"]
    for adapts in ("outer", "inner", "own"):
        rule = FedHyper.model_validate({"period": 12, "adapts": adapts})
        assert simulate(cluster(rule, 3, 60, task=bowl, inner=inner)).after["loss"] < 0.8 * plain


def test_a_cosine_is_one_along_a_vector_and_nothing_beside_or_without_one() -> None:
    x, y = torch.randn(1000, generator=torch.Generator().manual_seed(0)), torch.zeros(1000)
    assert cosine(x, 3 * x) == pytest.approx(1, abs=1e-7)
    assert cosine(x, -x) == pytest.approx(-1, abs=1e-7)
    assert cosine(x, y) == 0 == cosine(Phantom(3), Phantom(3))  # type: ignore[arg-type]
    assert cosine(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])) == pytest.approx(math.sqrt(0.5), abs=1e-7)
