"""Factored Gossip DiLoCo (arXiv 2606.22768): two gossips in the place of an all-reduce, one of them hidden."""

from __future__ import annotations

import itertools

import torch
from cluster import apart, cluster, crash, quadratic, replicas, rounds, start_of
from torch import Tensor

from decentral.journal import Trained
from decentral.protocols import All, DiLoCo, FactoredGossip, Nesterov, RandomGroups
from decentral.sim.simulate import simulate


def mixing(groups: set[tuple[int, ...]], workers: int) -> Tensor:
    w = torch.zeros(workers, workers, dtype=torch.float64)
    for group in groups:
        for row in group:
            w[row, list(group)] = 1 / len(group)
    return w


def test_it_equals_the_equations() -> None:
    rule = FactoredGossip(period=4, outer=Nesterov(lr=0.6, momentum=0.5), gradients=RandomGroups(size=3))
    run = cluster(apart(rule), 6, steps=28)
    outcome = simulate(run)
    task = quadratic(run)

    def matrices(channel: str) -> list[Tensor]:
        found = rounds(outcome, channel).values()
        return [mixing({record.members for record in records}, 6) for records in found]

    first, second = matrices("parameters"), matrices("gradients")
    assert len(first) == len(second) == 7
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    centres = torch.stack([task.centre(worker) for worker in range(6)]).double()
    anchor = torch.stack([start_of(worker, 16) for worker in range(6)]).double()
    momentum = torch.zeros_like(anchor)
    for w1, w2 in zip(first, second, strict=True):
        delta = w2 @ ((1 - (1 - 0.1 * task.curvatures().double()) ** 4) * (anchor - centres))
        momentum = 0.5 * momentum + delta
        anchor = w1 @ anchor - 0.6 * (delta + 0.5 * momentum)
    assert torch.allclose(replicas(outcome).double(), anchor, rtol=0, atol=5e-6)


def test_two_complete_mixings_are_diloco() -> None:
    factored = simulate(cluster(FactoredGossip(period=5, parameters=All(), gradients=All()), 4, 40))
    diloco = simulate(cluster(DiLoCo(period=5), 4, 40))
    assert torch.allclose(replicas(factored), replicas(diloco), atol=2e-6)


def test_the_mixing_of_parameters_hides_behind_the_local_steps() -> None:
    """A vector takes 0.2 s to travel, a local phase 0.5 s: one vector a round is waited for, and verdicts."""
    size = 25_000
    run = cluster(
        FactoredGossip(period=10), 2, 40, task={"name": "quadratic", "dimension": size}, up_bps=4e6, down_bps=4e6
    )
    outcome = simulate(run)
    done = [record.time_s for record in outcome.records if isinstance(record, Trained) and record.worker == 0]
    waited = [after - before - 0.5 for before, after in itertools.pairwise(done)]
    assert all(0.2 < seconds < 0.3 for seconds in waited)


def test_a_death_costs_its_partners_a_mixing() -> None:
    run = cluster(FactoredGossip(period=5), 5, 40, events=[crash(0.6, 2)], detection_s=0.3)
    outcome = simulate(run)
    assert sorted(outcome.params) == [0, 1, 3, 4]
    for channel in ("parameters", "gradients"):
        said = [record for records in rounds(outcome, channel).values() for record in records]
        assert {record.outcome for record in said if 2 not in record.members} == {"committed"}
    assert (replicas(outcome) - quadratic(run).optimum(5)).norm(dim=1).max() < 2 * (
        quadratic(run).start - quadratic(run).optimum(5)
    ).norm()
