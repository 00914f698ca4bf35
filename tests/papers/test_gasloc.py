"""GASLoC (arXiv 2606.11081): its equation, Nesterov in the mean, and where momentum pulls replicas apart."""

from __future__ import annotations

import pytest
import torch
from cluster import STILL, apart, cluster, crash, quadratic, replicas, rounds, spread, start_of, watched

from decentral.errors import ConfigError
from decentral.protocols import All, DiLoCo, GASLoC, Gossip, Nesterov, RandomGroups, Ring
from decentral.sim.simulate import simulate


def test_it_equals_the_equation_on_a_ring() -> None:
    rule = apart(GASLoC(period=3, lr=0.8, mixing=0.6, momentum=0.4, topology=Ring()))
    run = cluster(rule, 5, steps=21)
    outcome = simulate(run)
    task = quadratic(run)
    w = torch.eye(5, dtype=torch.float64) / 3
    for worker in range(5):
        w[worker, [(worker + 1) % 5, (worker - 1) % 5]] = 1 / 3
    laplacian = torch.eye(5, dtype=torch.float64) - w
    centres = torch.stack([task.centre(worker) for worker in range(5)]).double()
    theta = torch.stack([start_of(worker, 16) for worker in range(5)]).double()
    before = theta
    for _ in range(7):
        drift = ((1 - 0.1 * task.curvatures().double()) ** 3 - 1) * (theta - centres)
        ahead = theta + 0.8 * drift
        theta = ahead - 0.6 * laplacian @ ahead + 0.4 * (ahead - before)
        before = ahead
    assert torch.allclose(replicas(outcome).double(), theta, rtol=0, atol=5e-6)


@pytest.mark.parametrize("topology", [All(), Ring(), RandomGroups()])
def test_the_mean_replica_is_dilocos_with_nesterov(topology: All | Ring | RandomGroups) -> None:
    """Equal curvature: the mean's drift depends on the mean alone, and mixing keeps the mean."""
    gasloc = simulate(cluster(GASLoC(period=5, topology=topology), 4, 40))
    diloco = simulate(cluster(DiLoCo(period=5, outer=Nesterov(lr=0.7, momentum=0.5)), 4, 40))
    assert torch.allclose(replicas(gasloc).mean(dim=0), diloco.params[0], atol=2e-6)


def test_without_momentum_and_with_the_whole_drift_it_is_gossip() -> None:
    gasloc = simulate(cluster(apart(GASLoC(period=4, lr=1.0, momentum=0.0)), 6, 24))
    gossip = simulate(cluster(apart(Gossip(period=4)), 6, 24))
    assert torch.allclose(replicas(gasloc), replicas(gossip), atol=2e-6)


def test_momentum_beyond_the_bound_is_refused_and_would_drift_apart() -> None:
    with pytest.raises(ConfigError, match=r"rule\.mixing: 1 .* momentum 0\.9, groups of 2 and 4 .* \(0, 0\.5429\)"):
        GASLoC(momentum=0.9).check(4)
    GASLoC(momentum=0.9, mixing=0.5).check(4)
    GASLoC(momentum=0.9, topology=Ring()).check(4)

    def grown(mixing: float) -> float:
        """Return the squared spread after some 35 rounds of three replicas, where the bound is 0.38."""
        values = []
        for seed in range(3):
            watch = watched()
            rule = GASLoC(period=watch, momentum=0.9, mixing=mixing)
            simulate(cluster(apart(rule, seed), 3, 40, task=STILL, seed=seed))
            history = spread(watch.history())
            values.append((history[-10:].mean() / history[0]).item())
        return sum(values) / 3

    assert grown(0.6) > 1
    assert grown(0.2) < 0.2


def test_a_worker_left_alone_is_nesterov_by_itself() -> None:
    run = cluster(GASLoC(period=5), 2, 30, events=[crash(0.01, 1)], detection_s=0.0)
    outcome = simulate(run)
    alone = simulate(cluster(DiLoCo(period=5, outer=Nesterov(lr=0.7, momentum=0.5)), 1, 30))
    assert torch.allclose(outcome.params[0], alone.params[0], atol=2e-6)
    assert {record.outcome for records in rounds(outcome, "pair").values() for record in records} == {"committed"}
