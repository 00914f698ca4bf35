"""HeLoCo (arXiv 2606.00271): how late outer gradients are bent towards the momentum."""

from __future__ import annotations

import math

import pytest
import torch
from cluster import NET, cluster
from torch import Tensor

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


def test_rules_train_with_it_and_time_alone_can_be_simulated() -> None:
    for rule in (DiLoCo(period=4, outer=HeLoCo()), DecoupledDiLoCo(period=4, outer=HeLoCo())):
        run = cluster(rule, 3, 40, task={"name": "quadratic", "dimension": 20})
        outcome = simulate(run)
        assert outcome.after["loss"] < outcome.before["loss"]
        assert simulate(run, timing_only=True).seconds == outcome.seconds
    fitted, whole = (
        simulate(cluster(rule, 3, 40, task=NET)).params[0]
        for rule in (
            DecoupledDiLoCo(period=4, outer=HeLoCo()),
            DecoupledDiLoCo(period=4, outer=HeLoCo(agree=0.0)),
        )
    )
    assert not torch.equal(fitted, whole)
