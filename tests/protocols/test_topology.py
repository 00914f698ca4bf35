"""With whom: matchings that are perfect, uniform and the same for all; links that both ends know of."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cluster import short
from torch import Tensor

from decentral.config import validated
from decentral.errors import ConfigError
from decentral.journal import Synced
from decentral.members import Members
from decentral.protocols import All, Edges, Exponential, Gossip, RandomGroups, Ring, Topology, Torus
from decentral.protocols.topology import Links, require_two
from decentral.sim.simulate import simulate

EVERY = [All(), RandomGroups(), RandomGroups(size=3), RandomGroups(size=5), Ring(), Exponential()]
EVERY += [Exponential(one_peer=True), Torus(), Edges(edges=((0, 1), (1, 2), (5, 7), (7, 1), (2, 5), (8, 0)))]


def links(
    topology: Topology, members: Members, round_: int = 1, seed: int = 0, cohort: Members | None = None
) -> dict[int, Links]:
    """Return everybody's links. Topologies read four attributes of a peer: id, members, cohort, seed."""

    def peer(worker: int) -> Any:
        return SimpleNamespace(id=worker, members=members, cohort=cohort or members, seed=seed)

    return {worker: topology.links(peer(worker), round_) for worker in members}


def first(workers: int) -> Members:
    return Members(0, tuple(range(workers)))


@pytest.mark.parametrize("topology", EVERY, ids=short)
@pytest.mark.parametrize("members", [first(1), first(2), first(3), first(8), first(9), Members(3, (2, 5, 7, 11, 30))])
def test_both_ends_of_a_link_know_of_it(topology: Topology, members: Members) -> None:
    for round_ in range(1, 6):
        found = links(topology, members, round_)
        for worker, mine in found.items():
            assert worker not in mine.to + mine.source
            assert list(mine.to) == sorted(set(mine.to))
            assert list(mine.source) == sorted(set(mine.source))
            assert set(mine.to + mine.source) <= set(members)
            assert all(worker in found[other].source for other in mine.to)
            assert all(worker in found[other].to for other in mine.source)


def groups(members: Members, size: int, round_: int, seed: int = 0) -> list[tuple[int, ...]]:
    found = links(RandomGroups(size=size), members, round_, seed)
    return sorted({tuple(sorted((worker, *mine.to))) for worker, mine in found.items()})


@pytest.mark.parametrize(
    ("workers", "size"), [(8, 2), (9, 2), (9, 3), (10, 3), (11, 4), (5, 5), (3, 8), (2, 2), (1, 2)]
)
def test_groups_partition_the_workers_evenly(workers: int, size: int) -> None:
    for round_ in range(1, 20):
        found = groups(first(workers), size, round_)
        assert sorted(itertools.chain(*found)) == list(range(workers))
        assert len(found) == -(-workers // size)
        sizes = [len(group) for group in found]
        assert max(sizes) <= size
        assert max(sizes) - min(sizes) <= 1


def test_matchings_differ_by_round_and_by_seed_and_repeat_for_both() -> None:
    by_round = {tuple(groups(first(16), 2, round_)) for round_ in range(1, 30)}
    by_seed = {tuple(groups(first(16), 2, 1, seed)) for seed in range(30)}
    assert len(by_round) == 29
    assert len(by_seed) == 30
    assert groups(first(16), 2, 7, seed=3) == groups(first(16), 2, 7, seed=3)


def test_who_has_left_changes_nobody_elses_group() -> None:
    """Workers that learn of a leave at different times agree about everybody who is still there."""
    whole = first(9)
    for round_ in range(1, 20):
        before = links(RandomGroups(size=3), whole, round_)
        after = links(RandomGroups(size=3), whole.without(4).without(7), round_, cohort=whole)
        for worker, mine in after.items():
            assert set(mine.to) == set(before[worker].to) - {4, 7}


def chi_square(counts: Counter[tuple[int, ...]], kinds: int) -> float:
    expected = sum(counts.values()) / kinds
    return sum((count - expected) ** 2 for count in counts.values()) / expected + expected * (kinds - len(counts))


def test_matchings_of_six_are_uniform() -> None:
    """15 perfect matchings, 3,000 rounds: chi-square of 14 degrees of freedom below its 99.9 % quantile, 36.1."""
    counts = Counter(str(groups(first(6), 2, round_)) for round_ in range(1, 3001))
    assert len(counts) == 15
    assert chi_square(counts, 15) < 36.1  # type: ignore[arg-type]


def test_the_odd_one_out_is_uniform() -> None:
    """7 workers, 2,100 rounds: 6 degrees of freedom, 99.9 % quantile 22.5."""
    counts = Counter(next(g for g in groups(first(7), 2, round_) if len(g) == 1) for round_ in range(1, 2101))
    assert chi_square(counts, 7) < 22.5


def test_ring_and_exponential_links() -> None:
    members = Members(4, (1, 4, 6, 9, 12))
    ring = links(Ring(), members)
    assert ring[1] == Links((4, 12), (4, 12))
    assert ring[6] == Links((4, 9), (4, 9))
    assert links(Ring(), first(2))[0] == Links((1,), (1,))
    assert links(Ring(), first(1))[0] == Links((), ())
    exponential = links(Exponential(), members)
    assert exponential[1] == Links((4, 6, 12), (4, 9, 12))
    assert links(Exponential(), first(16))[3] == Links((4, 5, 7, 11), (1, 2, 11, 15))
    assert links(Exponential(), first(1))[0] == Links((), ())
    one = [links(Exponential(one_peer=True), first(8), round_)[0].to for round_ in range(1, 6)]
    assert one == [(1,), (2,), (4,), (1,), (2,)]


# -- mixing -----------------------------------------------------------------------------------------------------------


def matrix(topology: Topology, workers: int, round_: int = 1) -> Tensor:
    """Return W of equal weights on oneself and one's sources, from the links: [N, N] float64."""
    mixing = torch.zeros(workers, workers, dtype=torch.float64)
    for worker, mine in links(topology, first(workers), round_).items():
        weight = 1 / (1 + len(mine.source))
        mixing[worker, [worker, *mine.source]] = weight
    return mixing


def weighted(topology: Topology, workers: int) -> Tensor:
    """Return W of the topology's own weights, [N, N] float64."""
    mixing = torch.zeros(workers, workers, dtype=torch.float64)
    members = first(workers)
    for worker, mine in links(topology, members).items():
        peer: Any = SimpleNamespace(id=worker, members=members, cohort=members, seed=0)
        for source, weight in topology.weights(peer, mine).items():
            mixing[worker, source] = weight
        mixing[worker, worker] = 1 - mixing[worker].sum()
    return mixing


STAR = Edges(edges=((0, 1), (0, 2), (0, 3), (0, 4), (3, 4)))


@pytest.mark.parametrize(
    ("topology", "workers"),
    [
        (STAR, 5),
        (Ring(), 5),
        (Ring(), 2),
        (Torus(), 12),
        (Torus(), 8),
        (Torus(), 7),
        (All(), 4),
        (RandomGroups(size=3), 7),
    ],
    ids=short,
)
def test_weights_are_symmetric_and_leave_something_for_oneself(topology: Topology, workers: int) -> None:
    mixing = weighted(topology, workers)
    assert torch.allclose(mixing, mixing.T)
    assert torch.allclose(mixing.sum(dim=0), torch.ones(workers, dtype=torch.float64))
    assert (mixing.diag() > 0).all()


def test_metropolis_weights() -> None:
    mixing = weighted(STAR, 5)
    assert mixing[0].tolist() == pytest.approx([1 / 5] * 5)
    assert mixing[1].tolist() == pytest.approx([1 / 5, 4 / 5, 0, 0, 0])
    assert mixing[3].tolist() == pytest.approx([1 / 5, 0, 0, 1 - 1 / 5 - 1 / 3, 1 / 3])


def test_torus_links_and_rate() -> None:
    """Rows of 4: the eigenvalues are (1 + 2 cos a + 2 cos b) / 5, those of second size 3 / 5."""
    torus = links(Torus(), first(12))
    assert torus[0] == Links((1, 3, 4, 8), (1, 3, 4, 8))
    assert torus[7].to == (3, 4, 6, 11)
    assert links(Torus(), first(8))[0].to == (1, 3, 4)
    assert links(Torus(), first(7)) == links(Ring(), first(7))
    assert links(Torus(), first(1))[0].to == ()
    assert gap(weighted(Torus(), 16)) == pytest.approx(0.64)


def test_edges_are_checked_and_do_not_close_over_the_dead() -> None:
    path = Edges(edges=((0, 1), (1, 2), (2, 3)))
    assert links(path, first(4).without(1)) == {0: Links((), ()), 2: Links((3,), (3,)), 3: Links((2,), (2,))}
    path.check(4)
    with pytest.raises(
        ConfigError, match=r"rule\.topology\.edges\.2: \(2, 3\) must be two different workers of 0 to 2"
    ):
        path.check(3)
    with pytest.raises(ConfigError, match=r"no way leads from worker 0 to worker 4"):
        path.check(5)
    with pytest.raises(ConfigError, match=r"edges\.0: \(1, 1\)"):
        Edges(edges=((1, 1),)).check(2)


def gap(mixing: Tensor) -> float:
    """Return p: |W x - mean|^2 <= (1 - p) |x - mean|^2, the worst case over x."""
    centred = mixing - torch.full_like(mixing, 1 / len(mixing))
    return 1 - float(torch.linalg.matrix_norm(centred, ord=2)) ** 2


@pytest.mark.parametrize(
    ("topology", "workers", "p", "digits"),
    [
        (Ring(), 16, 0.0989, 4),
        (Ring(), 32, 0.0255, 4),
        (Exponential(), 16, 0.64, 6),
        (Exponential(), 32, 0.5556, 4),
        (All(), 16, 1.0, 6),
    ],
    ids=["ring 16", "ring 32", "exponential 16", "exponential 32", "all"],
)
def test_mixing_rates_of_the_literature(topology: Topology, workers: int, p: float, digits: int) -> None:
    mixing = matrix(topology, workers)
    ones = torch.ones(workers, dtype=torch.float64)
    assert torch.allclose(mixing.sum(dim=0), ones)
    assert torch.allclose(mixing.sum(dim=1), ones)
    assert round(gap(mixing), digits) == p


def test_one_peer_exponential_averages_exactly_in_log2_rounds() -> None:
    product = torch.eye(16, dtype=torch.float64)
    for round_ in range(1, 5):
        product = matrix(Exponential(one_peer=True), 16, round_) @ product
    assert torch.allclose(product, torch.full((16, 16), 1 / 16, dtype=torch.float64))


def test_there_must_be_somebody_to_talk_to() -> None:
    with pytest.raises(ConfigError, match=r"rule 'gossip' needs at least 2 workers, the fleet has 1"):
        require_two(1, "gossip")
    require_two(2, "gossip")


@pytest.mark.parametrize("topology", [Ring(), Exponential(one_peer=True), RandomGroups()], ids=short)
def test_slow_workers_keep_their_links_when_quick_ones_have_finished(topology: Topology) -> None:
    """Among very unequal workers some finish rounds before others; nobody may wait in vain for who has gone."""
    fields = {
        "steps": 12,
        "task": {"name": "quadratic", "dimension": 3},
        "rule": Gossip(period=1, topology=topology),
        "inner": {"name": "sgd", "lr": 0.1},
        "fleet": {"workers": [{"count": 3}, {"speed": 0.2}, {"count": 13, "speed": 0.5}], "jitter": 1.5},
    }
    outcome = simulate(validated(fields, "test"))
    assert {record.outcome for record in outcome.records if isinstance(record, Synced)} == {"committed"}
