"""Gossip averaging (D-PSGD, arXiv 1705.09056): it keeps the mean and shrinks the spread as the mixing matrix says."""

from __future__ import annotations

import itertools

import pytest
import torch
from cluster import (
    STILL,
    all_equal,
    apart,
    cluster,
    crash,
    quadratic,
    replicas,
    rounds,
    short,
    spread,
    start_of,
    watched,
)
from plain import NOISY, Plain, close
from torch import Tensor

from decentral.protocols import (
    All,
    BFloat16,
    Codec,
    Edges,
    Exponential,
    Float32,
    Gossip,
    Int8,
    RandomGroups,
    Ring,
    Topology,
    Torus,
)
from decentral.sim.simulate import simulate

BIG = {**STILL, "dimension": 5000}


def history(rule_fields: dict[str, object], workers: int, steps: int, task: dict[str, object] = STILL) -> Tensor:
    watch = watched()
    simulate(cluster(apart(Gossip(period=watch, **rule_fields)), workers, steps, task=task))
    return watch.history()


@pytest.mark.parametrize("codec", [Float32(), BFloat16(), Int8()], ids=short)
@pytest.mark.parametrize("topology", [RandomGroups(), RandomGroups(size=3), Ring(), All(), Exponential()], ids=short)
@pytest.mark.parametrize("workers", [6, 9])
def test_the_mean_is_kept_whatever_the_codec_loses(workers: int, topology: Topology, codec: Codec) -> None:
    if isinstance(topology, RandomGroups) and workers % topology.size:
        workers -= workers % topology.size  # groups of unequal size have unequal weights only between groups
    seen = history({"topology": topology, "codec": codec}, workers, 5)
    means = seen.double().mean(dim=1)
    assert torch.allclose(means, means[0].expand_as(means), rtol=0, atol=1e-6)


def test_an_odd_worker_out_keeps_the_mean_too() -> None:
    means = history({}, 7, 6).double().mean(dim=1)
    assert torch.allclose(means, means[0].expand_as(means), rtol=0, atol=1e-6)


@pytest.mark.parametrize("codec", [Float32(), Int8()], ids=short)
def test_the_mean_is_kept_where_links_differ_in_number(codec: Codec) -> None:
    star = Edges(edges=((0, 1), (0, 2), (0, 3), (3, 4)))
    seen = history({"topology": star, "codec": codec}, 5, 40)
    means = seen.double().mean(dim=1)
    assert torch.allclose(means, means[0].expand_as(means), rtol=0, atol=1e-5)
    assert spread(seen[-1]) < 0.05 * spread(seen[0])


@pytest.mark.parametrize("topology", [Ring(), Torus()], ids=short)
def test_the_mean_is_kept_while_neighbours_finish(topology: Topology) -> None:
    """The weight of who has finished falls to its neighbours themselves."""
    speeds = [1, 0.3, 0.6, 0.9, 0.5, 0.8]
    outcome = simulate(cluster(apart(Gossip(period=1, topology=topology)), steps=12, task=STILL, speeds=speeds))
    starts = torch.stack([start_of(worker, 16) for worker in range(6)])
    assert torch.allclose(replicas(outcome).mean(dim=0), starts.mean(dim=0), atol=1e-6)


def test_everybody_with_everybody_mixes_completely_in_one_round() -> None:
    seen = history({"topology": All()}, 5, 1)
    assert torch.allclose(seen[1], seen[0].mean(dim=0).expand_as(seen[1]), atol=1e-6)


def test_a_pair_becomes_equal() -> None:
    first, second = history({}, 2, 1)[1]
    assert torch.allclose(first, second, rtol=0, atol=1e-6)


def mixing(topology: Topology, workers: int) -> Tensor:
    """Return W of the static topologies by hand: equal weights on oneself and one's sources, [N, N] float64."""
    matrix = torch.eye(workers, dtype=torch.float64)
    offsets = [1, -1] if isinstance(topology, Ring) else [-(1 << power) for power in range(4)]
    for row in range(workers):
        for offset in offsets:
            matrix[row, (row + offset) % workers] = 1
    return matrix / matrix.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("topology", [Ring(), Exponential()], ids=short)
def test_static_topologies_multiply_by_their_mixing_matrix(topology: Topology) -> None:
    seen = history({"topology": topology}, 16, 3).double()
    for before, after in itertools.pairwise(seen):
        assert torch.allclose(after, mixing(topology, 16) @ before, rtol=0, atol=2e-6)


@pytest.mark.parametrize("topology", [Ring(), Exponential()], ids=short)
def test_it_equals_the_reference_with_local_steps(topology: Topology) -> None:
    """theta_i <- sum_j w_ij (theta_j after H local steps), from one starting point on."""
    run = cluster(Gossip(period=3, topology=topology), 9, 18, task=NOISY)
    plain, w = Plain(run), mixing(topology, 9)
    theta = plain.start().repeat(9, 1)
    for first in range(0, 18, 3):
        drifted = [plain.sgd(worker, range(first, first + 3), theta[worker], 0.1) for worker in range(9)]
        theta = w @ torch.stack(drifted)
    assert close(replicas(simulate(run)), theta)


@pytest.mark.parametrize(("topology", "p"), [(Ring(), 0.0989), (Exponential(), 0.64)], ids=["ring", "exponential"])
def test_the_spread_shrinks_at_least_by_the_spectral_gap(topology: Topology, p: float) -> None:
    values = spread(history({"topology": topology}, 16, 6))
    assert all(after <= (1 - p + 1e-3) * before for before, after in itertools.pairwise(values))


def test_random_pairs_halve_the_spread_as_expected() -> None:
    """Per coordinate E spread' = (1 - N / (2 (N - 1))) spread; 5,000 coordinates, a standard error below 1 %."""
    values = spread(history({}, 16, 1, BIG))
    assert (values[1] / values[0]).item() == pytest.approx(1 - 16 / 30, rel=0.03)


def test_every_exchange_is_committed_by_both() -> None:
    outcome = simulate(cluster(Gossip(period=2), 6, 12))
    for records in rounds(outcome, "pair").values():
        assert {record.outcome for record in records} == {"committed"}
        assert all(record.worker in record.members and len(record.members) == 2 for record in records)
        assert len({record.members for record in records}) == 3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("topology", [RandomGroups(), RandomGroups(size=3)], ids=short)
def test_workers_out_of_step_agree_on_their_groups(topology: Topology, seed: int) -> None:
    """Some end while others are rounds behind: nobody waits for a partner that has been dealt to somebody else."""
    options = {"jitter": 0.5, "speeds": [1, 0.9, 0.8, 0.7, 1, 0.9, 0.8], "seed": seed}
    outcome = simulate(cluster(Gossip(period=2, topology=topology), steps=24, **options))
    assert {record.outcome for records in rounds(outcome, "pair").values() for record in records} == {"committed"}
    assert outcome.seconds < 60.0


@pytest.mark.parametrize("seed", range(3))
def test_a_death_costs_its_partners_an_exchange_and_nobody_else(seed: int) -> None:
    options = {"jitter": 0.5, "events": [crash(0.7, 3)], "detection_s": 0.5, "seed": seed}
    outcome = simulate(cluster(Gossip(period=2), 8, 40, **options))
    said = [record for records in rounds(outcome, "pair").values() for record in records]
    assert {record.outcome for record in said if 3 not in record.members} == {"committed"}
    assert {record.outcome for record in said if 3 in record.members} == {"committed", "skipped"}
    assert outcome.seconds < 60.0


def test_with_gradients_the_mean_replica_descends_like_the_mean_of_workers() -> None:
    """Equal curvature makes the mean's step independent of the mixing: it is SGD on the mean loss."""
    run = cluster(Gossip(period=4), 6, 20)
    task = quadratic(run)
    expected = torch.stack([task.after_sgd(worker, 0.1, 20) for worker in range(6)]).mean(dim=0)
    outcome = simulate(run)
    assert not all_equal(outcome)
    assert torch.allclose(replicas(outcome).mean(dim=0), expected, atol=2e-6)
