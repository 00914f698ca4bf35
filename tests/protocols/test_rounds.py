"""Rounds in the simulator: what survivors agree on when members crash or come too late."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
import torch
from cluster import (
    NET,
    all_equal,
    cluster,
    crash,
    drive,
    outcomes,
    quadratic,
    replicas,
    rounds,
    short,
    timed_by_messages,
)
from torch import Tensor

from decentral.journal import Left, Synced
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.protocols import DDP, BFloat16, Buckets, Codec, DiLoCo, Float32, Int8, LocalSGD, OuterSGD, SyncRule
from decentral.protocols.collectives import AllReduce
from decentral.protocols.rounds import Round, agreed_mean
from decentral.sim.simulate import simulate

SLOW_NET = {"up_bps": 1e6, "down_bps": 1e6, "latency_s": 0.02, "detection_s": 0.3}
"""16,000 bytes of parameters take 0.1 s or so: a crash can hit a round in the middle."""
BIG = {"name": "quadratic", "dimension": 4000}
MOMENTS = [0.1, 0.26, 0.3, 0.34, 0.36, 0.37, 0.38, 0.4, 0.43, 0.47, 0.485, 0.51, 0.6]
"""From local training (a phase ends at 0.25 s) to the second phase."""


def consistent(outcome: Outcome) -> None:
    """Assert that all who record a round say the same of it, and are its members."""
    for records in rounds(outcome).values():
        assert len({(record.outcome, record.members) for record in records}) == 1
        assert all(record.worker in record.members for record in records)


@pytest.mark.parametrize("at_s", MOMENTS)
@pytest.mark.parametrize("all_reduce", ["butterfly", "ring", "tree"])
def test_survivors_of_a_crash_are_bit_identical(all_reduce: AllReduce, at_s: float) -> None:
    rule = DiLoCo(period=5, all_reduce=all_reduce)
    run = cluster(rule, 4, 15, task=BIG, events=[crash(at_s, 3)], **SLOW_NET)
    outcome = simulate(run)
    consistent(outcome)
    assert sorted(outcome.params) == [0, 1, 2]
    assert all_equal(outcome)
    first, *others = outcomes(outcome)
    whole, survivors = (0, 1, 2, 3), (0, 1, 2)
    assert first in ({("committed", whole)}, {("degraded", survivors)})
    assert others[-1] == {("committed", survivors)}
    assert "skipped" not in {kind for said in outcomes(outcome) for kind, _ in said}
    quiet = simulate(cluster(rule, 4, 15, task=BIG, **SLOW_NET))
    assert outcome.seconds < 4 / 3 * quiet.seconds + 0.3  # detection and another attempt, not anybody's patience


@pytest.mark.parametrize("codec", [Float32(), BFloat16(), Int8()], ids=short)
@pytest.mark.parametrize("at_s", [0.28, 0.33, 0.38])
def test_bit_identical_whatever_the_codec(codec: Codec, at_s: float) -> None:
    outcome = simulate(cluster(LocalSGD(period=5, codec=codec), 4, 10, task=BIG, events=[crash(at_s, 1)], **SLOW_NET))
    assert sorted(outcome.params) == [0, 2, 3]
    assert all_equal(outcome)


def test_a_degraded_round_is_the_mean_of_the_survivors_kept_contributions() -> None:
    run = cluster(LocalSGD(period=5), 4, 5, task=BIG, events=[crash(0.3, 2)], **SLOW_NET)
    outcome = simulate(run)
    assert outcomes(outcome) == [{("degraded", (0, 1, 3))}]
    task = quadratic(run)
    expected = torch.stack([task.after_sgd(worker, 0.1, 5) for worker in (0, 1, 3)]).mean(dim=0)
    assert torch.allclose(outcome.params[0], expected, atol=1e-6)


def test_a_crash_after_all_contributions_arrived_commits_the_whole_round() -> None:
    """The dead worker's part is in: divisor and members count it."""
    run = cluster(LocalSGD(period=5), 4, 5, task=BIG, events=[crash(0.49, 2)], **SLOW_NET)
    outcome = simulate(run)
    assert outcomes(outcome) == [{("committed", (0, 1, 2, 3))}]
    task = quadratic(run)
    expected = torch.stack([task.after_sgd(worker, 0.1, 5) for worker in range(4)]).mean(dim=0)
    assert torch.allclose(outcome.params[0], expected, atol=1e-6)


@pytest.mark.parametrize("at_s", [0.02, 0.06, 0.08, 0.11, 0.16, 0.21, 0.4])
def test_ddp_survives_a_crash_with_buckets_in_flight(at_s: float) -> None:
    rule = DDP(buckets=Buckets(megabytes=4e-5))
    options = {"up_bps": 3e4, "down_bps": 3e4, "latency_s": 0.005, "detection_s": 0.1}
    outcome = simulate(cluster(rule, 4, 6, task=NET, events=[crash(at_s, 1)], **options))
    consistent(outcome)
    assert sorted(outcome.params) == [0, 2, 3]
    assert all_equal(outcome)
    assert "skipped" not in {kind for said in outcomes(outcome) for kind, _ in said}


@pytest.mark.parametrize("speeds", [(1, 0.4, 1, 1), (0.4, 1, 1, 1)])
@pytest.mark.parametrize("all_reduce", ["butterfly", "ring", "tree"])
def test_who_waits_for_a_slow_worker_learns_of_a_death_meanwhile(
    all_reduce: AllReduce, speeds: tuple[float, ...]
) -> None:
    """The slow worker begins the round after the death, among fewer members: nobody may wait for it in the old one."""
    run = cluster(
        DiLoCo(period=10, all_reduce=all_reduce), steps=20, speeds=speeds, events=[crash(0.6, 3)], detection_s=0.1
    )
    outcome = simulate(run)
    assert outcomes(outcome) == [{("degraded", (0, 1, 2))}, {("committed", (0, 1, 2))}]
    assert outcome.seconds < 3.0
    assert all_equal(outcome)


def test_two_crashes_and_the_attempts_they_need() -> None:
    run = cluster(DiLoCo(period=5), 5, 10, task=BIG, events=[crash(0.3, 4), crash(0.7, 1)], **SLOW_NET)
    outcome = simulate(run)
    assert outcomes(outcome) == [{("degraded", (0, 2, 3))}, {("committed", (0, 2, 3))}]
    assert all_equal(outcome)


def test_the_last_survivor_trains_on() -> None:
    events = [crash(0.3, 0), crash(0.31, 1), crash(0.8, 3)]
    outcome = simulate(cluster(DiLoCo(period=5), 4, 20, task=BIG, events=events, **SLOW_NET))
    assert list(outcome.params) == [2]
    assert [record.reason for record in outcome.records if isinstance(record, Left)].count("crashed") == 3
    assert outcomes(outcome)[-1] == {("committed", (2,))}


# -- skipped rounds ---------------------------------------------------------------------------------------------------


class Late(DiLoCo):
    """Worker 2 stands still for a while before it begins."""

    sleep_s: float = 1.0

    async def run(self, peer: Peer) -> None:
        if peer.id == 2:
            await asyncio.sleep(self.sleep_s)
        await super().run(peer)


@pytest.mark.parametrize("all_reduce", ["butterfly", "ring", "tree"])
def test_a_worker_that_stood_still_is_back_in_step_after_the_rounds_it_missed(all_reduce: AllReduce) -> None:
    """It stands still for less than two patiences: one round is skipped, all others are committed."""
    run = cluster(Late(period=5, all_reduce=all_reduce, sleep_s=1.5), 4, 30, patience_s=1.0)
    outcome = simulate(run)
    everybody = (0, 1, 2, 3)
    assert outcomes(outcome) == [{("skipped", everybody)}] + [{("committed", everybody)}] * 5
    assert all_equal(outcome)


def test_rounds_missed_one_after_the_other() -> None:
    outcome = simulate(cluster(Late(period=5, sleep_s=3.5), 3, 40, patience_s=1.0))
    said = [next(iter(what))[0] for what in outcomes(outcome)]
    assert said == ["skipped"] * 3 + ["committed"] * 5
    assert all_equal(outcome)


def test_a_skipped_round_leaves_everything_alone_and_the_next_delta_spans_both_phases() -> None:
    def params(steps: int) -> Outcome:
        return simulate(cluster(Late(period=5, outer=OuterSGD(), sleep_s=1.5), 4, steps, patience_s=1.0))

    task = quadratic(cluster(DiLoCo(period=5)))
    skipped, after = params(5), params(10)
    for worker in range(4):
        assert torch.equal(skipped.slots[worker]["anchor"], torch.full((16,), task.start))
        assert torch.equal(skipped.slots[worker]["momentum"], torch.zeros(16))
        assert torch.allclose(skipped.params[worker], task.after_sgd(worker, 0.1, 5), atol=1e-6)
    both = torch.stack([task.after_sgd(worker, 0.1, 10) for worker in range(4)]).mean(dim=0)
    assert torch.allclose(after.params[0], both, atol=1e-6)


def test_a_skipped_round_is_a_ddp_step_without_a_gradient() -> None:
    async def late_ddp(peer: Peer) -> None:
        if peer.id == 1:
            await asyncio.sleep(5.0)
        await DDP().run(peer)
        results[peer.id] = peer.params.clone()

    results: dict[int, Tensor] = {}
    drive(late_ddp, 2, steps=1, patience_s=1.0)
    start = torch.full((16,), quadratic(cluster(DDP())).start)
    assert torch.equal(results[0], start)
    assert torch.equal(results[1], start)


# -- the round by itself ----------------------------------------------------------------------------------------------


def test_agreed_mean_alone_and_together() -> None:
    async def script(peer: Peer) -> Tensor | None:
        return await agreed_mean(peer, torch.full((5,), float(peer.id)), Float32())

    for workers in (1, 2, 5):
        results = drive(script, workers)
        assert all(torch.equal(mean, torch.full((5,), (workers - 1) / 2)) for mean in results.values())


def test_pieces_meet_by_index_whatever_order_they_come_in() -> None:
    async def script(peer: Peer) -> list[Tensor] | None:
        round_ = Round(peer, Float32())
        for index in (0, 1, 2) if peer.id % 2 else (2, 0, 1):
            await asyncio.sleep(0.01 * (peer.id + 1))
            round_.contribute(torch.full((4,), 10.0 * index + peer.id), index)
        return await round_.settle()

    for means in drive(script, 3).values():
        assert [mean.tolist() for mean in means] == [[1.0] * 4, [11.0] * 4, [21.0] * 4]


def test_channels_may_be_in_flight_together() -> None:
    async def script(peer: Peer) -> list[float]:
        flights = [Round(peer, Float32(), channel=f"fragment {index}") for index in range(3)]
        for index, flight in enumerate(flights):
            flight.contribute(torch.full((2,), float(index + peer.id)))
        return [(await flight.settle())[0][0].item() for flight in reversed(flights)]  # type: ignore[index]

    assert list(drive(script, 3).values()) == [[3.0, 2.0, 1.0]] * 3


def test_different_lengths_skip_the_round() -> None:
    async def script(peer: Peer) -> Tensor | None:
        return await agreed_mean(peer, torch.ones(8 + peer.id), Float32())

    assert set(drive(script, 3).values()) == {None}


@pytest.mark.parametrize(
    "rule",
    [DDP(), LocalSGD(period=3), DiLoCo(period=3, codec=Int8()), DiLoCo(period=3, all_reduce="ring")],
    ids=short,
)
@pytest.mark.parametrize("events", [[], [crash(0.17, 2)]], ids=["quiet", "crash"])
def test_timing_only_tells_the_same_story(rule: SyncRule, events: list) -> None:  # type: ignore[type-arg]
    run = cluster(rule, 4, 9, task=BIG, events=events, **SLOW_NET)
    real, timing = simulate(run), timed_by_messages(run)

    def told(outcome: Outcome) -> list[Synced | Left]:
        return [record for record in outcome.records if isinstance(record, (Synced, Left))]

    def story(outcome: Outcome) -> list[object]:
        return [(each.worker, getattr(each, "outcome", None), each.sent_bytes) for each in told(outcome)]

    assert story(timing) == story(real)
    assert [each.time_s for each in told(timing)] == [each.time_s for each in told(real)]
    assert timing.seconds == real.seconds
    without = simulate(run, timing_only=True)  # messages, where that can be: at one time somebody else may be first
    assert Counter(story(without)) == Counter(story(real))
    assert without.seconds == pytest.approx(real.seconds, rel=0, abs=1e-9)


def test_the_same_run_twice_is_the_same_bits_and_records() -> None:
    run = cluster(DiLoCo(period=3, codec=Int8()), 4, 12, events=[crash(0.2, 1)], jitter=0.4, patience_s=0.3, seed=5)
    first, second = simulate(run), simulate(run)
    assert first.records == second.records
    assert torch.equal(replicas(first), replicas(second))
