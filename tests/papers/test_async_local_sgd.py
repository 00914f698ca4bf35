"""Asynchronous local SGD (arXiv 2401.09135): delayed Nesterov, grace and DyLU."""

from __future__ import annotations

import heapq
import math
from typing import Any

import pytest
import torch
from cluster import NET, all_equal, cluster, crash, replicas, rounds, short
from plain import NOISY, Plain, close
from torch import Tensor

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.journal import Trained
from decentral.outcome import Outcome
from decentral.protocols import AsyncLocalSGD, DiLoCo, Int8
from decentral.protocols.codecs import E3M0, EF21, Codec, ErrorFeedback, TopK
from decentral.sim.simulate import simulate

QUICK: dict[str, Any] = {"latency_s": 0.0, "up_bps": 1e15, "down_bps": 1e15}
"""A network so fast that the order of events is that of the workers' speeds."""


def phases(outcome: Outcome, worker: int) -> list[int]:
    return [record.steps for record in outcome.records if isinstance(record, Trained) and record.worker == worker]


@pytest.mark.parametrize("task", [NOISY, NET], ids=["quadratic", "net"])
def test_with_equal_speeds_and_a_grace_it_is_diloco(task: dict[str, Any]) -> None:
    asynchronous = simulate(cluster(AsyncLocalSGD(period=5, dylu=False), 4, 25, task=task))
    synchronous = simulate(cluster(DiLoCo(period=5), 4, 25, task=task))
    assert all_equal(asynchronous)
    assert torch.allclose(replicas(asynchronous), replicas(synchronous), atol=1e-6)


def test_with_an_infinite_grace_nobody_starts_before_all_have_arrived() -> None:
    rule = AsyncLocalSGD(period=5, dylu=False, grace_s=math.inf)
    asynchronous = simulate(cluster(rule, 3, 20, task=NOISY, speeds=(1, 0.5, 0.2)))
    synchronous = simulate(cluster(DiLoCo(period=5), 3, 20, task=NOISY))
    assert torch.allclose(replicas(asynchronous), replicas(synchronous), atol=1e-6)


def test_one_worker_is_diloco_with_one_worker() -> None:
    """N = 1: every push is a Nesterov step, whatever c."""
    for spread in (0.0, 0.6, 1.0):
        alone = simulate(cluster(AsyncLocalSGD(period=4, spread=spread), 1, 20))
        assert torch.allclose(alone.params[0], simulate(cluster(DiLoCo(period=4), 1, 20)).params[0], atol=1e-6)


def reference(run: Run, rule: AsyncLocalSGD, speeds: tuple[float, ...], period: int) -> Tensor:
    """Algorithm 3 without DyLU on float64 tensors: events in order of time, pushes taken one by one."""
    plain, delay = Plain(run), rule.delay or len(speeds)
    model, momentum, pushed, count = plain.start(), torch.zeros(12).double(), torch.zeros(12).double(), 0
    began = dict.fromkeys(plain.workers, model)
    done = dict.fromkeys(plain.workers, 0)
    events = [(period * run.fleet.step_time_s / speed, worker) for worker, speed in enumerate(speeds)]
    heapq.heapify(events)
    together, deadline = [], 0.0  # who go on from the same model, and when
    while events:
        now, worker = heapq.heappop(events)
        steps = range(done[worker], done[worker] + period)
        gradient = began[worker] - plain.sgd(worker, steps, began[worker], 0.1)
        pushed, count = pushed + gradient, count + 1
        if count % delay == 0:
            momentum, pushed = rule.momentum * momentum + pushed / delay, 0 * pushed
            share = 1 - rule.spread * delay + rule.spread
        else:
            share = rule.spread
        model = model - rule.lr * (share * rule.momentum * momentum + gradient / delay)
        together.append(worker)
        deadline = now + rule.grace_s if len(together) == 1 else deadline
        if not events or events[0][0] > deadline:
            again = deadline if events else now  # nobody is left to wait for
            for each in together:
                began[each], done[each] = model, done[each] + period
                if done[each] < run.steps:
                    heapq.heappush(events, (again + period * run.fleet.step_time_s / speeds[each], each))
            together = []
    return model


@pytest.mark.parametrize(
    ("delay", "spread", "grace_s"), [(None, 0.0, 0.0), (2, 0.25, 0.0), (4, 0.1, 0.0), (None, 0.0, 0.07), (2, 0.1, 0.3)]
)
def test_it_equals_the_reference(delay: int | None, spread: float, grace_s: float) -> None:
    speeds = (1.0, 0.77, 0.43)
    rule = AsyncLocalSGD(period=4, delay=delay, spread=spread, dylu=False, grace_s=grace_s, lr=0.4)
    run = cluster(rule, steps=20, task=NOISY, speeds=speeds, **QUICK)
    outcome = simulate(run)
    assert all_equal(outcome)
    assert close(outcome.params[0], reference(run, rule, speeds, 4))
    assert len(rounds(outcome, "server 0")) == 3 * 5  # every push is an update


def test_nesterov_at_every_push_moves_as_the_papers_equation_5() -> None:
    """Four equal pushes g: m = (1 + b + b2 + b3) g; the model moves by lr (4 + 4 b + 3 b2 + 2 b3 + b4) g."""
    rule = AsyncLocalSGD(period=3, delay=1, dylu=False, lr=0.01)
    run = cluster(rule, 4, 3, task={"name": "quadratic", "dimension": 8, "spread": 0.0})
    outcome, plain = simulate(run), Plain(run)
    g, b = plain.start() - plain.sgd(0, range(3), plain.start(), 0.1), rule.momentum
    assert close(outcome.slots[0]["momentum"], (1 + b + b**2 + b**3) * g)
    # m grows before it is used: each coefficient of equation 5 is a product of b and the m of that push.
    assert close(outcome.params[0], plain.start() - 0.01 * (4 + 4 * b + 3 * b**2 + 2 * b**3 + b**4) * g)


def test_dylu_gives_steps_in_proportion_to_speed() -> None:
    outcome = simulate(cluster(AsyncLocalSGD(period=50), steps=170, speeds=(1, 0.5, 0.25), **QUICK))
    assert [phases(outcome, worker)[:3] for worker in range(3)] == [[50, 50, 50], [50, 25, 25], [50, 12, 12]]


def test_with_dylu_all_finish_within_a_step_of_each_other() -> None:
    speeds = (0.9, 1.0, 0.37, 0.61)
    run = cluster(AsyncLocalSGD(period=20), steps=150, speeds=speeds, **QUICK)
    outcome = simulate(run)
    quickest_s = 20 * run.fleet.step_time_s
    for worker, speed in enumerate(speeds):
        for steps in phases(outcome, worker)[1:-1]:
            assert 0 <= quickest_s - steps * run.fleet.step_time_s / speed < run.fleet.step_time_s / speed + 1e-9


def test_the_same_run_twice_has_the_same_events() -> None:
    """Workers of equal speed arrive at the same instant."""
    run = cluster(AsyncLocalSGD(period=3, grace_s=0), 4, 12)
    first, second = simulate(run), simulate(run)
    assert [record.to_json() for record in first.records] == [record.to_json() for record in second.records]


def test_a_worker_that_leaves_is_not_waited_for() -> None:
    run = cluster(AsyncLocalSGD(period=5), 3, 40, task=NOISY, events=[crash(0.6, 2)])
    outcome = simulate(run)
    assert sorted(outcome.params) == [0, 1]
    assert all_equal(outcome)
    assert outcome.seconds < 1.5 * simulate(cluster(AsyncLocalSGD(period=5), 3, 40, task=NOISY)).seconds + 2


@pytest.mark.parametrize("codec", [Int8(block=8), E3M0(), ErrorFeedback(codec=TopK(chunk=6, k=3))], ids=short)
def test_coarse_pushes_come_near_to_exact_ones(codec: Codec) -> None:
    exact = simulate(cluster(AsyncLocalSGD(period=5), 3, 40, task=NOISY))
    coarse = simulate(cluster(AsyncLocalSGD(period=5, codec=codec), 3, 40, task=NOISY))
    start = torch.ones(12)
    assert 0 < (coarse.params[0] - exact.params[0]).norm() < 0.5 * (start - exact.params[0]).norm()


def test_time_alone() -> None:
    run = cluster(AsyncLocalSGD(period=5), steps=40, speeds=(1, 0.6, 0.3))
    assert simulate(run, timing_only=True).seconds == simulate(run).seconds


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rule\.spread: 0\.5 .* at most 0\.25"):
        AsyncLocalSGD(spread=0.5).check(4)
    with pytest.raises(ConfigError, match=r"rule\.codec: 'ef21'"):
        AsyncLocalSGD(codec=EF21(codec=TopK())).check(4)
