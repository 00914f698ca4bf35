"""Clipped gossip (arXiv 2202.01545): what one lying link can do is bounded, and one tau for all keeps the mean."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cluster import STILL, apart, cluster, drive, replicas, short, spread, start_of, watched
from torch import Tensor

from decentral.peer import Peer
from decentral.protocols import All, Gossip, Int8, RandomGroups, Ring, Topology
from decentral.protocols.gossip import Clip, mix
from decentral.sim.simulate import simulate

SIZE = 16


def history(workers: int, steps: int, **fields: object) -> Tensor:
    watch = watched()
    simulate(cluster(apart(Gossip(period=watch, **fields)), workers, steps, task=STILL))
    return watch.history().double()


def clipped(pull: Tensor, tau: float) -> Tensor:
    return pull * min(1.0, tau / float(pull.norm()))


@pytest.mark.parametrize("tau", [0.5, 3.0, 5.5])
@pytest.mark.parametrize(("topology", "reach"), [(Ring(), (-1, 1)), (All(), (1, 2, 3, 4, 5))], ids=["ring", "all"])
def test_static_topologies_follow_the_paper(topology: Topology, reach: tuple[int, ...], tau: float) -> None:
    """x_i <- x_i + sum_j W_ij clip(x_j - x_i, tau), worked out in float64 from the points before the round."""
    for before, after in itertools.pairwise(history(6, 3, topology=topology, clip=tau)):
        expected = before.clone()
        for worker, step in itertools.product(range(6), reach):
            expected[worker] += clipped(before[(worker + step) % 6] - before[worker], tau) / (1 + len(reach))
        assert torch.allclose(after, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("fields", [{}, {"topology": RandomGroups(size=3)}, {"topology": Ring()}, {"codec": Int8()}])
def test_one_tau_for_all_keeps_the_mean(fields: dict[str, object]) -> None:
    means = history(6, 5, clip=2.0, **fields).mean(dim=1)
    assert torch.allclose(means, means[0].expand_as(means), rtol=0, atol=1e-6)


def test_a_tau_of_each_workers_own_moves_the_mean() -> None:
    means = history(6, 5, topology=All(), clip="auto").mean(dim=1)
    assert (means[-1] - means[0]).norm() > 1e-3


@pytest.mark.parametrize("topology", [RandomGroups(), Ring(), All()], ids=short)
def test_a_tau_that_nothing_reaches_changes_no_bit(topology: Topology) -> None:
    assert torch.equal(history(6, 4, topology=topology, clip=1e6), history(6, 4, topology=topology))


def test_a_pair_far_apart_meets_by_half_of_tau_each() -> None:
    (first, second), (first_after, second_after) = history(2, 1, clip=0.25)
    apart_by = (second - first).norm().item()
    assert (second_after - first_after).norm().item() == pytest.approx(apart_by - 0.25, abs=1e-5)
    assert (first_after - first).norm().item() == pytest.approx(0.125, abs=1e-6)


def with_a_liar(clip: Clip, lie: float, rounds: int) -> Tensor:
    """Return where seven honest workers are, at first and after each round in which worker 0 says `lie`: [., 7, P]."""

    async def script(peer: Peer) -> Tensor:
        peer.params.copy_(start_of(peer.id, SIZE))
        seen = [peer.params.clone()]
        for _ in range(rounds):
            if peer.id == 0:
                peer.params.fill_(lie)
            number = peer.next_round("pair")
            await mix(peer, RandomGroups().links(peer, number), Gossip().codec, number, clip)
            seen.append(peer.params.clone())
        return torch.stack(seen)

    seen = drive(script, 8, task=STILL)
    return torch.stack([seen[worker] for worker in range(1, 8)], dim=1)


@pytest.mark.parametrize("lie", [1e5, -1e15])
def test_a_liar_moves_an_honest_worker_by_half_of_tau_a_round_at_most(lie: float) -> None:
    tau, rounds = 2.0, 8
    moves = with_a_liar(tau, lie, rounds).mean(dim=1).double().diff(dim=0)  # of the honest mean: pairs keep it
    assert (moves.norm(dim=1) <= tau / 2 / 7 * (1 + 1e-5) + 1e-6).all()
    assert moves.norm(dim=1).max() == pytest.approx(tau / 2 / 7, rel=1e-4)
    assert with_a_liar(None, lie, rounds).abs().max() > 1e4


@pytest.mark.parametrize("clip", [2.0, "auto"])
def test_what_has_no_finite_norm_counts_nothing(clip: Clip) -> None:
    """1e30 is a number, and its square is not: a float32 norm is infinite."""
    before, *_, after = with_a_liar(clip, 1e30, 8)
    assert torch.isfinite(after).all()
    assert (after.mean(dim=0) - before.mean(dim=0)).norm() < (1e-5 if clip == 2.0 else before.std())


def test_auto_bounds_a_liar_by_what_is_usual() -> None:
    honest = with_a_liar("auto", 1e5, 20)
    usual = torch.cdist(honest[0], honest[0]).max()
    moved = (honest[1:].mean(dim=1) - honest[:-1].mean(dim=1)).norm(dim=1)
    assert moved.max() < usual / 2
    assert honest.abs().max() < 20


def test_auto_learns_three_distances_before_it_mixes() -> None:
    seen = history(2, 3, clip="auto")
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    assert torch.allclose(seen[3, 0], seen[0].mean(dim=0), atol=1e-6)
    assert torch.allclose(seen[3, 1], seen[0].mean(dim=0), atol=1e-6)


def test_auto_is_the_median_distance() -> None:
    """With four links the first round knows four distances; the lower of the two middle ones is tau."""
    before, after = history(5, 1, topology=All(), clip="auto")
    for worker in range(5):
        pulls = [before[other] - before[worker] for other in range(5) if other != worker]
        tau = sorted(float(pull.norm()) for pull in pulls)[1]
        expected = before[worker] + sum(clipped(pull, tau) for pull in pulls) / 5
        assert torch.allclose(after[worker], expected, rtol=0, atol=2e-6)


def test_auto_remembers_the_last_sixteen_distances() -> None:
    outcome = simulate(cluster(apart(Gossip(period=1, topology=Ring(), clip="auto")), 5, 20))
    kept = outcome.slots[0]["distances"]
    assert kept.shape == (16,)
    assert ((kept > 0) & (kept < math.inf)).all()


def test_honest_workers_still_come_together_under_auto() -> None:
    values = spread(history(16, 40, clip="auto"))
    assert values[-1] < 1e-3 * values[0]


def test_clipped_gossip_trains_like_gossip_where_nobody_lies() -> None:
    plain, auto = (replicas(simulate(cluster(Gossip(period=4, clip=clip), 6, 60))) for clip in (None, "auto"))
    assert torch.allclose(auto.mean(dim=0), plain.mean(dim=0), atol=0.15)
