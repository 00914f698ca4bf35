"""HeLoCo (arXiv 2606.00271): how late outer gradients are bent towards the momentum."""

from __future__ import annotations

import math

import pytest
import torch
from cluster import NET, cluster, timed_by_messages
from plain import NOISY, Plain
from torch import Tensor

from decentral.config import Run
from decentral.inner import SGD
from decentral.protocols import DecoupledDiLoCo, DiLoCo, HeLoCo
from decentral.sim.simulate import simulate


def corrected(gradient: Tensor, momentum: Tensor, **fields: float) -> Tensor:
    """Return what one step takes the gradient for, read from where it leaves the momentum: b <- g / 2 + b / 2."""
    after = momentum.clone()
    HeLoCo(momentum=0.5, **fields).step(torch.zeros_like(gradient), gradient, after)
    return 2 * (after - momentum / 2)


def at(degrees: float, length: float = 2.0) -> Tensor:
    return length * torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])


@pytest.mark.parametrize("degrees", [0.0, 30.0, 59.0, -45.0])
def test_a_gradient_that_agrees_is_kept(degrees: float) -> None:
    assert torch.allclose(corrected(at(degrees), at(0.0, 5.0)), at(degrees), atol=1e-6)


@pytest.mark.parametrize("degrees", [61.0, 75.0, 90.0])
@pytest.mark.parametrize("side", [1, -1])
def test_one_that_is_askew_is_turned_to_the_angle_and_keeps_its_length(degrees: float, side: int) -> None:
    assert torch.allclose(corrected(at(side * degrees), at(0.0, 5.0)), at(side * 60.0), atol=1e-5)
    assert torch.allclose(corrected(at(side * degrees), at(0.0), agree=math.cos(math.radians(30))), at(side * 30.0))


@pytest.mark.parametrize("degrees", [91.0, 120.0, 179.0])
def test_one_that_opposes_loses_what_points_back(degrees: float) -> None:
    assert torch.allclose(corrected(at(degrees), at(0.0, 5.0)), at(degrees) * torch.tensor([0.0, 1.0]), atol=1e-6)


def test_zeros_change_nothing() -> None:
    assert torch.equal(corrected(at(120.0), torch.zeros(2)), at(120.0))
    assert torch.equal(corrected(torch.zeros(2), at(0.0)), torch.zeros(2))


def test_tensors_are_judged_one_by_one() -> None:
    gradient, momentum = torch.cat([at(120.0), at(10.0)]), torch.cat([at(0.0), at(0.0)])
    after, kept = momentum.clone(), gradient.clone()
    HeLoCo(momentum=0.5).fit([2, 2]).step(torch.zeros(4), gradient, after)
    found = 2 * (after - momentum / 2)
    assert torch.allclose(found[:2], at(120.0) * torch.tensor([0.0, 1.0]), atol=1e-6)
    assert torch.allclose(found[2:], at(10.0), atol=1e-6)
    assert torch.equal(gradient, kept)


def test_the_step_is_the_formula() -> None:
    anchor, momentum = torch.zeros(2), at(0.0, 1.0)
    HeLoCo(lr=0.7, momentum=0.9).step(anchor, at(10.0), momentum)
    expected = 0.9 * at(0.0, 1.0) + 0.1 * at(10.0)
    assert torch.allclose(momentum, expected)
    assert torch.allclose(anchor, -0.7 * (at(10.0) + 0.9 * expected))


def reference(run: Run, period: int, eta: float, mu: float, agree: float) -> tuple[Tensor, set[str]]:
    """DiLoCo with this outer optimiser on plain tensors, and what became of its outer gradients."""
    plain, met = Plain(run), set()
    anchor = plain.start()
    b = torch.zeros_like(anchor)
    for first in range(0, run.steps, period):
        ends = [plain.sgd(worker, range(first, first + period), anchor, run.inner.lr) for worker in plain.workers]
        g = anchor - torch.stack(ends).mean(dim=0)
        cosine = float(g @ b / (g.norm() * b.norm())) if b.any() else 1.0
        met.add("kept" if cosine >= agree else "turned" if cosine >= 0 else "cut")
        if cosine < agree:
            along = b / b.norm()
            across = g - (g @ along) * along
            g = across if cosine < 0 else g.norm() * (agree * along + (1 - agree**2) ** 0.5 * across / across.norm())
        b = mu * b + (1 - mu) * g
        anchor = anchor - eta * (g + mu * b)
    return anchor, met


def test_diloco_with_it_equals_the_reference() -> None:
    """A step of more than the way overshoots, so that gradients come to agree, to be askew, and to oppose."""
    outer = HeLoCo(lr=1.1, momentum=0.8, agree=0.7)
    run = cluster(DiLoCo(period=6, outer=outer), 3, 60, task=NOISY, inner=SGD(lr=0.15), batch_size=2)
    expected, met = reference(run, 6, 1.1, 0.8, 0.7)
    assert met == {"kept", "turned", "cut"}
    assert torch.allclose(simulate(run).params[0].double(), expected, rtol=0, atol=1e-5)


def test_who_sums_in_another_order_takes_the_same_step() -> None:
    """Threads are what changes the order here; every replica takes the step by itself."""
    generator, threads = torch.Generator().manual_seed(3), torch.get_num_threads()
    for angle in (-0.3, 0.3, 0.8):
        momentum = torch.randn(300_000, generator=generator)
        gradient = angle * momentum + (1 - angle**2) ** 0.5 * torch.randn(300_000, generator=generator)
        steps = []
        try:
            for count in (1, 2, 4):
                torch.set_num_threads(count)
                steps.append((torch.ones(300_000), momentum.clone()))
                HeLoCo().step(steps[-1][0], gradient, steps[-1][1])
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(one, other) for step in steps for one, other in zip(step, steps[0], strict=True))


def test_rules_train_with_it_and_time_alone_can_be_simulated() -> None:
    for rule in (DiLoCo(period=4, outer=HeLoCo()), DecoupledDiLoCo(period=4, outer=HeLoCo())):
        run = cluster(rule, 3, 40, task={"name": "quadratic", "dimension": 20})
        outcome = simulate(run)
        assert outcome.after["loss"] < outcome.before["loss"]
        assert timed_by_messages(run).seconds == outcome.seconds
        assert simulate(run, timing_only=True).seconds == pytest.approx(outcome.seconds, rel=0, abs=1e-9)
    fitted, whole = (
        simulate(cluster(rule, 3, 40, task=NET)).params[0]
        for rule in (
            DecoupledDiLoCo(period=4, outer=HeLoCo()),
            DecoupledDiLoCo(period=4, outer=HeLoCo(agree=0.0)),
        )
    )
    assert not torch.equal(fitted, whole)
