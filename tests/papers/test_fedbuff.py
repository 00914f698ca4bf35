"""FedBuff (arXiv 2106.06581), and adaptive braking (arXiv 2007.01397) on staleness as it measures it."""

from __future__ import annotations

import heapq
import math

import pytest
import torch
from cluster import all_equal, cluster, crash, replicas, rounds
from plain import NOISY, Plain, close
from test_async_local_sgd import QUICK
from torch import Tensor

from decentral.config import Run
from decentral.protocols import AdaptiveBraking, FedBuff, LocalSGD, OuterSGD
from decentral.sim.simulate import simulate


def test_a_buffer_of_all_workers_at_equal_speeds_is_local_sgd() -> None:
    buffered = simulate(cluster(FedBuff(period=5, buffer=4), 4, 25, task=NOISY))
    synchronous = simulate(cluster(LocalSGD(period=5), 4, 25, task=NOISY))
    assert all_equal(buffered)
    assert torch.allclose(replicas(buffered), replicas(synchronous), atol=1e-6)
    assert len(rounds(buffered, "server 0")) == 5


def reference(run: Run, speeds: tuple[float, ...], period: int, buffer: int, eta: float) -> tuple[Tensor, list[int]]:
    """The model, and the staleness of every push, on float64 tensors: events in order of time."""
    plain = Plain(run)
    model, version, change, held, staleness = plain.start(), 0, 0 * plain.start(), 0, []
    began = dict.fromkeys(plain.workers, (model, 0))
    done = dict.fromkeys(plain.workers, 0)
    events = [(period * run.fleet.step_time_s / speed, worker) for worker, speed in enumerate(speeds)]
    heapq.heapify(events)
    while events:
        now, worker = heapq.heappop(events)
        start, start_version = began[worker]
        end = plain.sgd(worker, range(done[worker], done[worker] + period), start, 0.1)
        staleness.append(version - start_version)
        change, held = change + (start - end) / math.sqrt(1 + staleness[-1]) / buffer, held + 1
        if held == buffer:
            model, version, change, held = model - eta * change, version + 1, 0 * change, 0
        began[worker], done[worker] = (model, version), done[worker] + period
        if done[worker] < run.steps:
            heapq.heappush(events, (now + period * run.fleet.step_time_s / speeds[worker], worker))
    return model, staleness


def test_it_equals_the_reference() -> None:
    speeds = (1.0, 0.77, 0.23)
    run = cluster(
        FedBuff(period=4, buffer=2, grace_s=0, outer=OuterSGD(lr=0.8)), 3, 24, task=NOISY, speeds=speeds, **QUICK
    )
    model, staleness = reference(run, speeds, 4, 2, 0.8)
    assert max(staleness) >= 2  # the slow worker is late
    assert close(simulate(run).params[0], model)


def test_braking_heeds_the_staleness_that_the_server_measures() -> None:
    """At equal speeds nothing is late, and it is heavy ball to the bit; with a straggler it is not."""
    braking, heavy_ball = (FedBuff(period=4, buffer=3, outer=AdaptiveBraking(rho=rho, late=0.3)) for rho in (2.0, 0.0))
    equal = [simulate(cluster(rule, 3, 24, task=NOISY)).params[0] for rule in (braking, heavy_ball)]
    assert torch.equal(*equal)
    unequal = [
        simulate(cluster(rule, 3, 24, task=NOISY, speeds=(1, 0.8, 0.3))).params[0] for rule in (braking, heavy_ball)
    ]
    assert not torch.allclose(*unequal, atol=1e-3)


def test_a_worker_that_leaves_is_not_waited_for() -> None:
    outcome = simulate(cluster(FedBuff(period=5, buffer=3), 3, 40, task=NOISY, events=[crash(0.6, 2)]))
    assert sorted(outcome.params) == [0, 1]
    assert all_equal(outcome)
    assert rounds(outcome, "server 0")[4][0].members == (0, 0, 1) or rounds(outcome, "server 0")[4][0].members == (
        0,
        1,
        1,
    )


def test_time_alone() -> None:
    run = cluster(FedBuff(period=5, buffer=2, outer=AdaptiveBraking()), steps=40, speeds=(1, 0.6, 0.3))
    assert simulate(run, timing_only=True).seconds == simulate(run).seconds


# -- the optimiser ----------------------------------------------------------------------------------------------------


def velocity(rho: float, gradient: Tensor, before: Tensor, *, staleness: float = 1.0, clamp: bool = True) -> Tensor:
    """Return a times the gradient, that is what a step adds to mu v."""
    outer, after = AdaptiveBraking(rho=rho, clamp=clamp).delayed(staleness), before.clone()
    outer.step(torch.zeros_like(before), gradient, after)
    return after - 0.9 * before


def test_without_rho_without_velocity_and_without_staleness_it_is_heavy_ball() -> None:
    g, v = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 2.0])
    for found in (velocity(0.0, g, v), velocity(2.0, g, 0 * v), velocity(2.0, g, v, staleness=0.5)):
        assert torch.allclose(found, g)
    anchors, momenta = [torch.ones(2), torch.ones(2)], [v.clone(), v.clone()]
    for outer, anchor, momentum in zip(
        (AdaptiveBraking(), OuterSGD(lr=0.7, momentum=0.9)), anchors, momenta, strict=True
    ):
        outer.step(anchor, g, momentum)
    assert torch.allclose(*anchors)


@pytest.mark.parametrize(("cosine", "factor"), [(1.0, 0.0), (-1.0, 3.0), (0.0, 1.0)])
def test_the_factor_is_one_less_rho_times_the_cosine(cosine: float, factor: float) -> None:
    v = torch.tensor([2.0, 0.0])
    g = torch.tensor([cosine, math.sqrt(1 - cosine**2)])
    assert torch.allclose(velocity(2.0, g, v), factor * g, atol=1e-6)
    assert torch.allclose(velocity(2.0, 5 * g, 7 * v), 5 * factor * g, atol=1e-5)  # scales do not count
    assert torch.allclose(velocity(2.0, g, v, clamp=False), (1 - 2 * cosine) * g, atol=1e-6)


def test_it_looks_at_each_tensor_by_itself() -> None:
    outer, v = AdaptiveBraking(rho=1.0).fit([2, 2]).delayed(1), torch.tensor([1.0, 0, 1, 0])
    g = torch.tensor([1.0, 0, -1, 0])
    after = v.clone()
    outer.step(torch.zeros(4), g, after)
    assert torch.allclose(after - 0.9 * v, torch.tensor([0.0, 0, -2, 0]))


def converges(rho: float, eta: float, delay: int, steps: int = 1500) -> bool:
    """Say whether gradients `delay` steps old find the minimum of a narrow valley."""
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    hessian = turn @ torch.diag(torch.tensor([1.0, 0.1])) @ turn.T
    outer = AdaptiveBraking(lr=eta, rho=rho).delayed(delay)
    points, v = [torch.tensor([1.0, 1.0])] * (delay + 1), torch.zeros(2)
    for _ in range(steps):
        anchor = points[-1].clone()
        outer.step(anchor, hessian @ points[-1 - delay], v)
        points.append(anchor)
        if not float(anchor.norm()) < 1e6:
            return False
    return float(points[-1].norm()) < 0.02


def test_it_allows_larger_steps_where_gradients_are_late_and_only_there() -> None:
    assert converges(2.0, 0.5, delay=16)
    assert not converges(0.0, 0.5, delay=16)
    assert not converges(0.0, 0.02, delay=16)
    assert converges(0.0, 3.0, delay=0)
