"""DADAO (arXiv 2208.00779): its events in their order, linear convergence, and what its fixed point looks like."""

from __future__ import annotations

import math
import random

import pytest
import torch
from cluster import cluster, crash, quadratic, replicas
from torch import Tensor

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.journal import Synced
from decentral.outcome import Outcome
from decentral.protocols import DADAO, All, Int8, Ring
from decentral.protocols.poisson import arrivals
from decentral.replica import seed_of
from decentral.sim.simulate import simulate

TASK = {"name": "quadratic", "dimension": 8, "curvature": (0.25, 1.0)}
RULE = DADAO(smoothness=1.0, convexity=0.25, edge_rates="uniform")


def reference(run: Run, workers: int, steps: int, rate: float) -> tuple[dict[str, Tensor], float]:
    """All events of a ring in order of time, integrated in small steps of Runge and Kutta: states [workers, P]."""
    task = quadratic(run)
    curvature = task.curvatures().double()
    centres = torch.stack([task.centre(worker) for worker in range(workers)]).double()
    times = [arrivals(0, worker, steps) for worker in range(workers)]
    end = max(each[-1] for each in times)
    events = [(time, (worker,)) for worker in range(workers) for time in times[worker]]
    for i in range(workers):
        pair = tuple(sorted((i, (i + 1) % workers)))
        time = 0.0
        for round_ in range(1, 100 * steps):
            time += random.Random(seed_of(0, f"edge {pair[0]}-{pair[1]}", round_)).expovariate(rate / workers)
            if time >= end:
                break
            events.append((time, pair))
    nu, big = 0.125, 1.0
    root = math.sqrt(nu / big)
    chi = 1 / (rate / workers * (2 - 2 * math.cos(2 * math.pi / workers)))
    s = torch.zeros(6, workers, 8, dtype=torch.float64)  # x, x~, y, y~, z, z~
    s[:2] = task.start

    def slope(s: Tensor) -> Tensor:
        x, xs, y, ys, z, zs = s
        return torch.stack(
            [
                root / 8 * (xs - x),
                root / 8 * (x - xs),
                root / 4 * (ys - y),
                -(y + z + nu * xs) / (2 * root),
                root / 4 * (zs - z),
                root / 8 * (z - zs),
            ]
        )

    now = 0.0
    for time, who in sorted(events):
        count = max(1, math.ceil((time - now) / 0.02))
        h = (time - now) / count
        for _ in range(count):
            a = slope(s)
            b = slope(s + h / 2 * a)
            c = slope(s + h / 2 * b)
            s = s + h / 6 * (a + 2 * b + 2 * c + slope(s + h * c))
        now = time
        if len(who) == 1:
            i = who[0]
            q = curvature * (s[0, i] - centres[i]) - nu * s[0, i] - s[3, i]
            s[0, i] -= q / (4 * big)
            s[1, i] -= q / (4 * math.sqrt(nu * big))
            s[3, i] += (root / 4 + 1) * q
        else:
            i, j = who
            gap = s[2, i] + s[4, i] - s[2, j] - s[4, j]
            for row, weight in ((4, 0.5), (5, 2 * chi / root)):
                s[row, i] -= weight * gap
                s[row, j] += weight * gap
    # The continuous part that a worker has not run yet since its last event leaves these two sums alone.
    return {"x": s[0] + s[1], "z": 0.5 * s[4] + s[5]}, end


def test_it_equals_the_equations() -> None:
    run = cluster(RULE, 4, 12, task=TASK, jitter=0.5)
    outcome = simulate(run)
    slow = 1 / (0.25 * 2)
    rate = math.sqrt(2 * slow * (0.5 * 4 * 3 / 4))
    expected, _ = reference(run, 4, 12, rate)
    slots = [outcome.slots[worker] for worker in range(4)]
    assert torch.allclose(torch.stack([s["x"] + s["x_slow"] for s in slots]).double(), expected["x"], atol=1e-4)
    assert torch.allclose(torch.stack([0.5 * s["z"] + s["z_slow"] for s in slots]).double(), expected["z"], atol=1e-3)


def error(outcome: Outcome, run: Run) -> float:
    """Return the largest distance of a replica from the optimum."""
    return (replicas(outcome) - quadratic(run).optimum(4)).norm(dim=1).max().item()


def test_every_replica_comes_to_the_optimum_at_a_linear_rate() -> None:
    """And there y + z is equal everywhere, while the z sum to zero."""
    errors = []
    for steps in (30, 60, 120):
        run = cluster(RULE, 4, steps, task=TASK)
        outcome = simulate(run)
        errors.append(error(outcome, run))
    assert errors[2] < 0.3 * errors[1] < 0.3 * 0.6 * errors[0]
    y = torch.stack([slots["y"] for slots in outcome.slots.values()])
    z = torch.stack([slots["z"] for slots in outcome.slots.values()])
    assert (y + z - (y + z).mean(dim=0)).norm() < 0.1 * z.norm()
    assert z.sum(dim=0).norm() < 0.1 * z.norm()


def test_more_meetings_do_not_change_the_gradients_that_are_needed() -> None:
    more = DADAO(smoothness=1.0, convexity=0.25, topology=Ring(), edge_rates="uniform", rate=2 * math.sqrt(6))
    runs = [cluster(rule, 4, 40, task=TASK) for rule in (RULE, more)]
    least, twice = [error(simulate(run), run) for run in runs]
    assert 0.3 * least < twice < 1.5 * least


def test_who_is_slow_changes_nothing() -> None:
    equal = simulate(cluster(RULE, 4, 10, task=TASK))
    unequal = simulate(cluster(RULE, steps=10, task=TASK, speeds=[1, 0.3, 0.6, 0.9], latency_s=0.1))
    assert torch.equal(replicas(equal), replicas(unequal))


def test_it_refuses_what_may_diverge() -> None:
    with pytest.raises(ConfigError, match=r"rule\.rate: 4 meetings a gradient are too few .* at least 4\.95"):
        DADAO(smoothness=1.0, convexity=0.25, topology=All(), edge_rates="uniform", rate=4.0).check(8)
    DADAO(smoothness=1.0, convexity=0.25, topology=All(), edge_rates="uniform", rate=4.9498).check(8)
    with pytest.raises(ConfigError, match=r"rule\.convexity: 2 must be at most"):
        DADAO(smoothness=1.0, convexity=2.0).check(4)


def test_int8_and_a_death() -> None:
    rule = DADAO(smoothness=1.0, convexity=0.25, edge_rates="uniform", codec=Int8())
    outcome = simulate(cluster(rule, 4, 20, task=TASK, events=[crash(0.5, 1)], detection_s=0.2))
    assert sorted(outcome.params) == [0, 2, 3]
    assert replicas(outcome).isfinite().all()
    late = [record for record in outcome.records if isinstance(record, Synced) and record.time_s > 0.9]
    assert {record.outcome for record in late} == {"committed"}
