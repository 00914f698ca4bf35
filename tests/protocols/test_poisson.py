"""Gossip in continuous time: how well graphs mix, which rates are best, and clocks that both ends of an edge read."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from decentral.errors import ConfigError
from decentral.members import Members
from decentral.protocols import All, Edges, Exponential, RandomGroups, Ring, Topology
from decentral.protocols.edge_rates import Edge, clocks, edge_shares, mixing_times, optimal_shares
from decentral.protocols.poisson import Meetings, arrivals, flow
from decentral.replica import seed_of


def complete(first: int, count: int) -> list[Edge]:
    return [(first + i, first + j) for i in range(count) for j in range(i + 1, count)]


BARBELL = [*complete(0, 4), (3, 4), (4, 5), *complete(5, 4)]
STAR = Edges(edges=tuple((0, leaf) for leaf in range(1, 8)))
PATH = Edges(edges=tuple((place, place + 1) for place in range(7)))


def least_rate(shares: dict[Edge, float], workers: int) -> float:
    """Return the meetings that DADAO needs in the time of one gradient a worker."""
    slow, resistance = mixing_times(shares, range(workers))
    return math.sqrt(2 * slow * resistance)


def test_a_ring_of_eight_that_meets_once_a_gradient() -> None:
    rates = {edge: 8 / 2 * share for edge, share in edge_shares(Ring(), range(8), "uniform").items()}
    slow, resistance = mixing_times(rates, range(8))
    assert slow == pytest.approx(1 / (1 - math.cos(math.pi / 4)))  # 3.414
    assert resistance == pytest.approx(0.875)
    assert 1 / (2 * math.sqrt(slow * resistance)) == pytest.approx(0.289, abs=5e-4)
    assert math.sqrt(slow / resistance) / 2 == pytest.approx(0.988, abs=5e-4)


@pytest.mark.parametrize(
    ("topology", "workers", "rate"),
    [(All(), 8, 7 / math.sqrt(2)), (Ring(), 8, 9.777), (STAR, 8, 7.0), (PATH, 8, 17.940)],
)
def test_rates_of_known_graphs(topology: Topology, workers: int, rate: float) -> None:
    assert least_rate(edge_shares(topology, range(workers), "uniform"), workers) == pytest.approx(rate, abs=6e-4)


def test_the_best_rates_are_those_of_the_semidefinite_programme() -> None:
    """Two cliques of four with a worker between them: its two edges should ring more often, and 39 % are saved."""
    uniform = dict.fromkeys(BARBELL, 1 / len(BARBELL))
    best = dict(zip(BARBELL, optimal_shares(tuple(BARBELL), 9), strict=True))
    assert sum(best.values()) == pytest.approx(1)
    assert least_rate(uniform, 9) == pytest.approx(30.645, abs=1e-3)
    assert least_rate(best, 9) == pytest.approx(18.748, rel=1e-3)
    assert best[3, 4] == pytest.approx(best[4, 5], rel=1e-2)
    assert best[3, 4] > 2.5 * max(best[edge] for edge in complete(0, 4))


def test_graphs_that_change_are_refused_and_directions_do_not_matter() -> None:
    with pytest.raises(ConfigError, match=r"rule\.topology: 'random_groups' is another graph in every round"):
        edge_shares(RandomGroups(), range(4), "uniform")
    assert set(edge_shares(Exponential(), range(5), "uniform")) == set(complete(0, 5))
    assert set(edge_shares(Ring(), (3, 5, 9), "uniform")) == {(3, 5), (5, 9), (3, 9)}


def test_on_a_path_equal_rates_are_best() -> None:
    """As the semidefinite programme finds too; here with workers of any numbers."""
    path = Edges(edges=((2, 5), (5, 9), (9, 11)))
    found = clocks(path, (2, 5, 9, 11), "optimal")
    assert list(found.shares) == [(2, 5), (5, 9), (9, 11)]
    assert list(found.shares.values()) == pytest.approx([1 / 3] * 3, rel=1e-2)
    slow, resistance = mixing_times(found.rates(6.0), (2, 5, 9, 11))
    assert (slow, resistance) == pytest.approx((found.slow / 6, found.resistance / 6))


def view(worker: int, members: Members) -> Any:
    """Return what `Meetings` reads of a peer."""
    rounds: dict[str, int] = {}

    def next_round(channel: str) -> int:
        rounds[channel] = rounds.get(channel, 0) + 1
        return rounds[channel]

    def rng(purpose: str, round_: int) -> Any:
        return random.Random(seed_of(7, purpose, round_))

    return SimpleNamespace(id=worker, members=members, next_round=next_round, rng=rng)


def test_both_ends_agree_on_every_meeting_and_clocks_are_poisson() -> None:
    """1,500 meetings of an end with rates 3 and 1: waits of mean 1 / 4 and deviation 1 / 4, shares 3 : 1."""
    members, rates = Members(0, (0, 1, 2)), {(0, 1): 3.0, (0, 2): 1.0}
    mine = Meetings(view(0, members), rates)
    found = [meeting for _ in range(1500) if (meeting := mine.next()) is not None]
    for other in (1, 2):
        theirs = Meetings(view(other, members), rates)
        with_me = [meeting for meeting in found if meeting.other == other]
        assert [(m.time, m.channel, m.round) for m in with_me] == [
            (m.time, m.channel, m.round) for _ in with_me if (m := theirs.next()) is not None
        ]
    waits = torch.tensor([meeting.time for meeting in found], dtype=torch.float64).diff()
    assert (waits > 0).all()
    assert waits.mean().item() == pytest.approx(1 / 4, abs=4 / 4 / math.sqrt(1500))
    assert waits.std().item() == pytest.approx(1 / 4, rel=0.15)
    share = sum(meeting.other == 1 for meeting in found) / 1500
    assert share == pytest.approx(3 / 4, abs=4 * math.sqrt(3 / 16 / 1500))


def test_nobody_is_met_who_has_left() -> None:
    peer = view(0, Members(0, (0, 1, 2)))
    meetings = Meetings(peer, {(0, 1): 1.0, (0, 2): 1.0})
    peer.members = peer.members.without(1)
    assert {meetings.next().other for _ in range(20)} == {2}  # type: ignore[union-attr]
    peer.members = peer.members.without(2)
    assert meetings.next() is None


def test_arrivals_have_rate_one() -> None:
    times = torch.tensor(arrivals(0, 3, 2000), dtype=torch.float64)
    assert times[-1].item() == pytest.approx(2000, abs=4 * math.sqrt(2000))
    assert arrivals(0, 3, 10) == arrivals(0, 3, 2000)[:10]
    assert arrivals(0, 4, 10) != arrivals(0, 3, 10)


def test_the_flow_is_the_exponential_of_its_matrix_and_a_semigroup() -> None:
    x, y = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, halves = (x.clone(), y.clone()), (x.clone(), y.clone())
    flow(*whole, 0.3, 1.4)
    for _ in range(2):
        flow(*halves, 0.3, 0.7)
    exponential = torch.matrix_exp(1.4 * 0.3 * torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    assert torch.allclose(torch.stack(whole), exponential @ torch.stack((x, y)), atol=1e-12)
    assert torch.allclose(torch.stack(whole), torch.stack(halves), atol=1e-12)
