"""Stochastic gradient push (arXiv 1811.10792): unbiased on directed graphs, and no mass is lost on the way."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from cluster import STILL, apart, cluster, crash, drive, quadratic, replicas, rounds, spread, start_of
from torch import Tensor

from decentral.peer import Peer
from decentral.protocols import SGP, Codec, Exponential, Float32, Gossip, Int8, Ring, Topology
from decentral.protocols.codecs import SignMagnitude
from decentral.protocols.sgp import UNIT, _Post
from decentral.protocols.topology import Links
from decentral.sim.simulate import simulate


class Lopsided(Topology):
    """A directed cycle, and worker 0 also sends to all others: strongly connected, far from doubly stochastic."""

    def links(self, peer: Peer, round_: int) -> Links:
        ids = peer.members.ids
        edges = {(worker, ids[(place + 1) % len(ids)]) for place, worker in enumerate(ids)}
        edges |= {(ids[0], worker) for worker in ids[1:]}
        to = tuple(sorted(b for a, b in edges if a == peer.id))
        return Links(to, tuple(sorted(a for a, b in edges if b == peer.id)))


def lopsided(workers: int) -> Tensor:
    """Return p of `Lopsided`, columns summing to one: [N, N] float64."""
    p = torch.eye(workers, dtype=torch.float64)
    for worker in range(workers):
        p[(worker + 1) % workers, worker] = 1
    p[:, 0] = 1
    return p / p.sum(dim=0)


def test_it_equals_the_equations_on_a_directed_graph() -> None:
    run = cluster(apart(SGP(period=3, topology=Lopsided())), 5, steps=18)
    outcome = simulate(run)
    task, p = quadratic(run), lopsided(5)
    z = torch.stack([start_of(worker, 16) for worker in range(5)]).double()
    x, w = z.clone(), torch.ones(5, 1, dtype=torch.float64)
    # The numerators begin at the workers' own starting points, as the parameters do.
    centres = torch.stack([task.centre(worker) for worker in range(5)]).double()
    for _ in range(6):
        x = p @ (x + ((1 - 0.1 * task.curvatures().double()) ** 3 - 1) * (z - centres))
        w = p @ w
        z = x / w
    assert torch.allclose(replicas(outcome).double(), z, rtol=0, atol=5e-6)
    masses = torch.stack([outcome.slots[worker]["mass"] for worker in range(5)]) / UNIT
    assert torch.allclose(masses, w, atol=1e-9)
    assert masses.max() / masses.min() > 2


def test_the_mean_of_all_where_plain_gossip_is_biased() -> None:
    def end(rule: Any) -> Tensor:
        return replicas(simulate(cluster(apart(rule), 5, steps=60, task=STILL)))

    mean = torch.stack([start_of(worker, 16) for worker in range(5)]).mean(dim=0)
    assert torch.allclose(end(SGP(topology=Lopsided())), mean.expand(5, 16), atol=1e-5)
    biased = end(Gossip(period=1, topology=Lopsided()))
    assert spread(biased) < 1e-6
    assert (biased[0] - mean).norm() > 0.3


@pytest.mark.parametrize("topology", [Exponential(one_peer=True), Exponential(), Ring()])
def test_with_a_doubly_stochastic_graph_it_is_d_psgd(topology: Topology) -> None:
    push = simulate(cluster(apart(SGP(period=2, topology=topology)), 6, 20))
    gossip = simulate(cluster(apart(Gossip(period=2, topology=topology)), 6, 20))
    assert torch.allclose(replicas(push), replicas(gossip), atol=2e-6)
    assert all(slots["mass"] / UNIT == pytest.approx(1, abs=1e-9) for slots in push.slots.values())


@pytest.mark.parametrize("codec", [Float32(), Int8(), SignMagnitude()])
def test_masses_are_conserved_exactly_and_numerators_whatever_the_codec_loses(codec: Codec) -> None:
    outcome = simulate(cluster(apart(SGP(topology=Lopsided(), codec=codec)), 5, 30, task=STILL))
    assert sum(int(slots["mass"].item()) for slots in outcome.slots.values()) == 5 * UNIT
    total = torch.stack([slots["numerator"] for slots in outcome.slots.values()]).double().sum(dim=0)
    starts = torch.stack([start_of(worker, 16) for worker in range(5)]).double()
    assert torch.allclose(total, starts.sum(dim=0), rtol=0, atol=1e-5)


def test_what_cannot_be_delivered_is_taken_back() -> None:
    """The other one dies before the first round: all mass comes home, and the survivor trains as if alone."""
    run = cluster(SGP(period=2), 2, 20, events=[crash(0.01, 1)], detection_s=0.3)
    outcome = simulate(run)
    assert int(outcome.slots[0]["mass"].item()) == UNIT
    assert torch.allclose(outcome.params[0], quadratic(run).after_sgd(0, 0.1, 20), atol=1e-5)
    said = [record.outcome for records in rounds(outcome, "push").values() for record in records]
    assert set(said) == {"degraded", "committed"}


def test_survivors_agree_although_mass_has_died() -> None:
    run = cluster(apart(SGP()), 6, 60, task=STILL, events=[crash(0.51, 3)], detection_s=0.2)
    outcome = simulate(run)
    left = [worker for worker in range(6) if worker != 3]
    assert sorted(outcome.params) == left
    assert spread(replicas(outcome)) < 1e-8
    mass = sum(slots["mass"] for slots in outcome.slots.values())
    total = torch.stack([slots["numerator"] for slots in outcome.slots.values()]).double().sum(dim=0)
    assert torch.allclose(total * UNIT / mass, outcome.params[0].double(), atol=1e-5)
    assert 3 * UNIT < mass < 6 * UNIT


def test_what_comes_too_late_for_its_round_is_added_in_a_later_one() -> None:
    async def script(peer: Peer) -> tuple[list[list[int]], int, Tensor]:
        peer.params.copy_(start_of(peer.id, 16))
        post, other = _Post(peer, SGP()), Links((1 - peer.id,), (1 - peer.id,))
        heard = []
        for round_ in (1, 2):
            await asyncio.sleep(1.5 * peer.id if round_ == 1 else 2.0)
            post.give(other, round_)
            heard.append(await post.take(other, round_))
        return heard, post.mass, post.numerator.clone()

    results = drive(script, workers=2, patience_s=1.0)
    assert (results[0][0], results[1][0]) == ([[], [1]], [[0], [0]])
    assert results[0][1] + results[1][1] == 2 * UNIT
    total = results[0][2] + results[1][2]
    assert torch.allclose(total, start_of(0, 16) + start_of(1, 16), atol=1e-6)


def test_more_mass_than_there_is_in_the_run_is_refused() -> None:
    async def script(peer: Peer) -> int:
        post, other = _Post(peer, SGP()), Links((1 - peer.id,), (1 - peer.id,))
        if peer.id:
            post.mass *= 8  # a liar
        post.give(other, 1)
        await post.take(other, 1)
        return post.mass

    assert drive(script, workers=2)[0] == UNIT // 2
