"""Collectives against float64 means and stated traffic; exchanges that both sides apply, or neither."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from cluster import all_equal, apart, cluster, crash, drive, outcomes, replicas, scripted, short, start_of
from torch import Tensor

from decentral.errors import PeerGone
from decentral.journal import Left
from decentral.peer import Peer
from decentral.protocols import All, BFloat16, Codec, DiLoCo, Float32, Gossip, Int8, RandomGroups, collectives
from decentral.protocols.collectives import ALL_REDUCE, Attempt, Contribution, all_gather, chunk_bounds, exchange
from decentral.protocols.topology import both_ways
from decentral.sim.simulate import simulate
from decentral.wire import FrameError

CODECS = [Float32(), BFloat16(), Int8(), Int8(block=3)]
SIZES = [0, 1, 3, 8, 1000]


def reduce_by(name: str, codec: Codec, numel: int) -> Callable[[Peer], Awaitable[Tensor]]:
    async def script(peer: Peer) -> Tensor:
        attempt = Attempt(peer.members, "test", 1)
        result = await ALL_REDUCE[name](peer, start_of(peer.id, numel), codec, attempt)
        await asyncio.sleep(1.0)  # a member stays until all are done, as it does in a round that is decided
        return result

    return script


def mean_of(workers: int, numel: int) -> Tensor:
    return torch.stack([start_of(worker, numel) for worker in range(workers)]).double().mean(dim=0)


@pytest.mark.parametrize("name", ALL_REDUCE)
@pytest.mark.parametrize("workers", range(1, 10))
def test_means_equal_the_float64_mean_within_rounding(name: str, workers: int) -> None:
    """Vectors shorter than the number of members and empty ones too. n - 1 sums and a division round."""
    for numel in SIZES:
        results = drive(reduce_by(name, Float32(), numel), workers)
        largest = torch.stack([start_of(worker, numel) for worker in range(workers)]).abs().sum(dim=0)
        for result in results.values():
            assert torch.equal(result, results[0])
            assert result.dtype == torch.float32
            error = (result.double() - mean_of(workers, numel)).abs()
            assert bool((error <= largest.double() * 2**-24).all())


@pytest.mark.parametrize("codec", CODECS, ids=short)
@pytest.mark.parametrize("name", ALL_REDUCE)
@pytest.mark.parametrize("workers", [1, 2, 5, 8])
def test_all_members_end_with_the_same_bits_whatever_the_codec(name: str, codec: Codec, workers: int) -> None:
    results = drive(reduce_by(name, codec, 700), workers)
    assert all(torch.equal(result, results[0]) for result in results.values())
    hops = 2 if name == "butterfly" else 2 * workers
    loss = hops * start_of(0, 700).abs().max() * (1 / 100 if codec.name == "int8" else 1 / 128)
    assert (results[0].double() - mean_of(workers, 700)).abs().max() <= loss


def test_the_butterfly_sums_in_ascending_order_of_workers() -> None:
    results = drive(reduce_by("butterfly", Float32(), 500), 5)
    total = start_of(0, 500)
    for worker in range(1, 5):
        total = total + start_of(worker, 500)
    assert torch.equal(results[3], total / 5)


def test_late_starters_change_no_bit() -> None:
    async def script(peer: Peer) -> Tensor:
        await asyncio.sleep(((peer.id * 3) % 5) * 0.1)
        return await reduce_by("butterfly", Float32(), 99)(peer)

    assert torch.equal(drive(script, 5)[2], drive(reduce_by("butterfly", Float32(), 99), 5)[2])


@pytest.mark.parametrize("name", ALL_REDUCE)
def test_contributions_are_left_alone_and_results_are_new(name: str) -> None:
    async def script(peer: Peer) -> bool:
        values = start_of(peer.id, 64)
        result = await ALL_REDUCE[name](peer, values, Float32(), Attempt(peer.members, "test", 1))
        result.zero_()
        return torch.equal(values, start_of(peer.id, 64))

    for workers in (1, 2, 3):
        assert all(drive(script, workers).values())


HEADER_BYTES = 64
"""No header of these tests is longer; the exact length depends on names and numbers."""


def traffic(script: Callable[[Peer], Awaitable[Any]], workers: int) -> list[Left]:
    rule, _ = scripted(script)
    return simulate(cluster(rule, workers)).left()


@pytest.mark.parametrize("codec", CODECS, ids=short)
@pytest.mark.parametrize("name", ["butterfly", "ring"])
@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_each_member_sends_and_receives_two_n_minus_one_nths_of_the_vector(
    name: str, codec: Codec, workers: int
) -> None:
    numel = 8 * 3 * 256
    payload = 2 * (workers - 1) * codec.wire_bytes(numel // workers)
    for left in traffic(reduce_by(name, codec, numel), workers):
        assert left.messages_sent == 2 * (workers - 1)
        assert payload <= left.sent_bytes <= payload + HEADER_BYTES * left.messages_sent
        assert payload <= left.received_bytes <= payload + HEADER_BYTES * left.messages_sent


def test_in_the_tree_an_inner_node_sends_up_to_three_vectors() -> None:
    sent = [left.messages_sent for left in traffic(reduce_by("tree", Float32(), 100), 7)]
    assert sent == [2, 3, 3, 1, 1, 1, 1]


@pytest.mark.parametrize("numel", [0, 1, 5, 16, 17])
@pytest.mark.parametrize("chunks", [1, 2, 5, 7])
def test_chunks_cover_the_vector_evenly(numel: int, chunks: int) -> None:
    bounds = chunk_bounds(numel, chunks)
    assert [index for start, stop in bounds for index in range(start, stop)] == list(range(numel))
    sizes = [stop - start for start, stop in bounds]
    assert len(sizes) == chunks
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("codec", CODECS, ids=short)
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_all_gather_gives_everybody_the_same_bits_in_ascending_order(codec: Codec, workers: int) -> None:
    async def script(peer: Peer) -> list[Tensor]:
        return await all_gather(peer, start_of(peer.id, 40), codec, Attempt(peer.members, "test", 1))

    results = drive(script, workers)
    for result in results.values():
        for worker in range(workers):
            assert torch.equal(result[worker].values, codec.round_trip(start_of(worker, 40)))


# -- failure ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_REDUCE)
def test_when_one_member_gives_up_nobody_waits_for_a_deadline_of_its_own(name: str) -> None:
    """Worker 0 never comes. Those who wait for it find out after one patience, all others with them."""

    async def script(peer: Peer) -> float | None:
        if peer.id == 0:
            await asyncio.sleep(100.0)
            return None
        with pytest.raises((TimeoutError, FrameError)):
            await reduce_by(name, Float32(), 60)(peer)
        return peer.now()

    results = drive(script, 6, patience_s=2.0, latency_s=0.01)
    assert all(seconds < 2.5 for worker, seconds in results.items() if worker)


# -- exchange ---------------------------------------------------------------------------------------------------------


def exchanging(
    workers: tuple[int, ...], delays: dict[int, float], numel: int = 8
) -> Callable[[Peer], Awaitable[dict[int, Tensor] | None]]:
    async def script(peer: Peer) -> dict[int, Tensor] | None:
        await asyncio.sleep(delays.get(peer.id, 0.0))
        links = both_ways(tuple(worker for worker in workers if worker != peer.id))
        return await exchange(peer, links, start_of(peer.id, numel), Float32(), round_=1)

    return script


def test_an_exchange_returns_what_the_others_sent() -> None:
    results = drive(exchanging((0, 1, 2), {}), 3)
    for worker, heard in results.items():
        assert sorted(heard) == [other for other in range(3) if other != worker]
        assert all(torch.equal(values, start_of(other, 8)) for other, values in heard.items())


def test_an_exchange_with_nobody_hears_nothing() -> None:
    assert drive(exchanging((0,), {}), 1) == {0: {}}


@pytest.mark.parametrize("late", [0.5, 0.95, 0.99, 1.0, 1.01, 1.05, 1.5, 5.0])
def test_a_pair_applies_an_exchange_both_or_neither(late: float) -> None:
    heard = drive(exchanging((0, 1), {1: late}), 2, patience_s=1.0)
    assert (heard[0] is None) == (heard[1] is None) == (late > 0.98)


@pytest.mark.parametrize("up_bps", [1e5, 1.25e5, 1.27e5, 1.28e5, 1.29e5, 1.3e5, 1.31e5, 1.32e5, 1.35e5, 2e5])
@pytest.mark.parametrize("late", [0.0, 0.03])
def test_a_slow_uplink_of_one_fails_both_or_neither(up_bps: float, late: float) -> None:
    """16,000 bytes take a second at 128 kbit/s, and that is the patience."""
    script = exchanging((0, 1), {0: late}, numel=4000)
    rule, heard = scripted(script)
    run = cluster(rule, 2, patience_s=1.0)
    slow = {"workers": [{"count": 1}, {"count": 1, "up_bps": up_bps}]}
    simulate(run.model_copy(update={"fleet": run.fleet.model_copy(update=type(run.fleet)(**slow).__dict__)}))
    assert (heard[0] is None) == (heard[1] is None)


@pytest.mark.parametrize("delays", [{1: 0.9}, {1: 0.9, 2: 0.5}, {3: 0.97}, {1: 0.6, 2: 0.97}, {0: 0.99}, {0: 1.5}])
def test_a_group_applies_an_exchange_all_or_none(delays: dict[int, float]) -> None:
    heard = drive(exchanging((0, 1, 2, 3), delays), 4, patience_s=1.0)
    assert len({values is None for values in heard.values()}) == 1


def test_a_failed_exchange_costs_two_deadlines_at_most() -> None:
    async def script(peer: Peer) -> float:
        await exchanging((0, 1, 2, 3), {1: 0.9, 2: 1.9, 3: 2.9})(peer)
        return peer.now()

    assert drive(script, 4, patience_s=1.0)[0] <= 2.0


@pytest.mark.parametrize("at_s", [0.01, 0.05, 0.15, 0.17, 0.18, 0.19, 0.2, 0.22])
def test_when_one_of_three_crashes_the_two_others_agree(at_s: float) -> None:
    script = exchanging((0, 1, 2), {}, numel=4000)
    rule, heard = scripted(script)
    simulate(cluster(rule, 3, events=[crash(at_s, 2)], up_bps=1e6, down_bps=1e6, detection_s=0.2))
    assert (heard[0] is None) == (heard[1] is None)


def test_a_failed_exchange_leaves_gossip_where_it_was() -> None:
    rule = apart(Gossip(period=5))
    outcome = simulate(cluster(rule, 2, 5, events=[crash(0.26, 1)], task={"name": "quadratic", "spread": 0.0}))
    task_start = start_of(0, 16)
    curvature = torch.logspace(-1, 0, 16, base=10.0)
    assert torch.allclose(replicas(outcome)[0], (1 - 0.1 * curvature) ** 5 * task_start, atol=1e-6)


@pytest.mark.parametrize("topology", [RandomGroups(), RandomGroups(size=3), All()], ids=short)
def test_closed_groups_keep_the_mean_when_some_come_too_late(topology: RandomGroups | All) -> None:
    """Jittery workers of little patience: many exchanges fail, none by halves."""
    still = {"name": "quadratic", "dimension": 16, "curvature": (1e-30, 1e-30)}
    rule = apart(Gossip(period=1, topology=topology))
    run = cluster(rule, 6, 12, task=still, jitter=1.0, patience_s=0.12, seed=3, latency_s=0.005)
    outcome = simulate(run)
    kinds = {getattr(record, "outcome", "") for record in outcome.records}
    assert {"committed", "skipped"} <= kinds
    start = torch.stack([start_of(worker, 16) for worker in range(6)]).double().mean(dim=0)
    assert torch.allclose(replicas(outcome).double().mean(dim=0), start, rtol=0, atol=1e-6)


# -- segments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [Float32(), Int8(block=16)], ids=short)
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_a_vector_in_many_segments_comes_to_the_same_bits(
    codec: Codec, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = drive(reduce_by("butterfly", codec, 1000), workers)
    monkeypatch.setattr(collectives, "SEGMENT", 64)
    for worker, result in drive(reduce_by("butterfly", codec, 1000), workers).items():
        assert torch.equal(result, whole[worker])


@pytest.mark.parametrize("at_s", [0.26, 0.3, 0.34, 0.38, 0.42, 0.5, 0.58])
def test_survivors_of_a_crash_in_some_segment_agree(at_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "SEGMENT", 256)
    net = {"up_bps": 1e6, "down_bps": 1e6, "latency_s": 0.02, "detection_s": 0.3}
    big = {"name": "quadratic", "dimension": 4000}
    outcome = simulate(cluster(DiLoCo(period=5), 4, 15, task=big, events=[crash(at_s, 3)], **net))
    assert sorted(outcome.params) == [0, 1, 2]
    assert all_equal(outcome)
    assert "skipped" not in {kind for said in outcomes(outcome) for kind, _ in said}
    assert outcome.seconds < 5.0  # nobody's patience


def test_who_gives_up_in_mid_segments_makes_nobody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "SEGMENT", 64)

    async def script(peer: Peer) -> float:
        attempt = Attempt(peer.members, "test", 1)
        if peer.id == 1:
            attempt = attempt._replace(fold=_fails)
        with pytest.raises((PeerGone, FrameError)):
            await ALL_REDUCE["butterfly"](peer, start_of(peer.id, 1000), Float32(), attempt)
        seconds = peer.now()
        await asyncio.sleep(1.0)
        return seconds

    assert max(drive(script, 3).values()) < 1.0


def _fails(_contributions: list[Contribution]) -> Tensor:
    raise FrameError("not_finite", "for the test")


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_gather_in_many_segments_comes_to_the_same_bits(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drive(reduce_by("gather", Int8(block=16), 1000), workers)
    monkeypatch.setattr(collectives, "SEGMENT", 64)
    for worker, result in drive(reduce_by("gather", Int8(block=16), 1000), workers).items():
        assert torch.equal(result, whole[worker])
