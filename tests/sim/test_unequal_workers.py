"""Phases that fit the workers' speeds: all finish together, whoever slows down, comes, dies or lies."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
from cluster import cluster, crash

from decentral.fleet import Event
from decentral.journal import Joined, Refused, Synced, Trained
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.protocols import SAVIC, DiLoCo, DyLU, Every, LocalSGD, NoLoCo, Schedule, SlowMo, SyncRule, Timed
from decentral.protocols.schedule import PROBE
from decentral.sim.simulate import simulate
from decentral.speeds import TOLD
from decentral.wire import signal

SPEEDS = (1.0, 0.5, 0.29, 0.2)
STEP_S = 0.05
"""The fleet's default, at speed 1."""
FAST = {"latency_s": 1e-4, "up_bps": 1e12, "down_bps": 1e12}


def phases(outcome: Outcome, worker: int) -> list[int]:
    """Return the worker's local steps by round; steps that are journaled one by one are added up."""
    found, steps = [], 0
    for record in outcome.records:
        if record.worker == worker and isinstance(record, Trained):
            steps += record.steps
        elif record.worker == worker and isinstance(record, Synced):
            found.append(steps)
            steps = 0
    return found


def ends(outcome: Outcome) -> dict[int, dict[int, float]]:
    """Return by round and worker when the worker had done its local steps of the round."""
    found: dict[int, dict[int, float]] = defaultdict(dict)
    last: dict[int, float] = {}
    for record in outcome.records:
        if isinstance(record, Trained):
            last[record.worker] = record.time_s
        elif isinstance(record, Synced):
            found[record.round][record.worker] = last[record.worker]
    return found


def waiting(outcome: Outcome, worker: int) -> float:
    """Return the share of its time in the run for which the worker did not compute."""
    seconds = next(left for left in outcome.left() if left.worker == worker).seconds
    return 1 - seconds["compute"] / sum(seconds.values())


@pytest.mark.parametrize("schedule", [DyLU(period=40), Timed(seconds=40 * STEP_S)], ids=["dylu", "timed"])
@pytest.mark.parametrize("rule", [DiLoCo, LocalSGD, SlowMo, NoLoCo, SAVIC], ids=lambda rule: rule.name)
def test_steps_are_as_the_speeds(rule: type[SyncRule], schedule: Schedule) -> None:
    """H_i = floor(H v_i / v_max), whether the rule has an all-reduce or not, a whole phase or single gradients."""
    outcome = simulate(cluster(rule(period=schedule), speeds=SPEEDS, steps=170, **FAST))
    for worker, speed in enumerate(SPEEDS):
        assert phases(outcome, worker)[2:4] == [math.floor(40 * speed + 1e-9)] * 2


@pytest.mark.parametrize("schedule", [DyLU(period=40), Timed(seconds=40 * STEP_S)], ids=["dylu", "timed"])
def test_nobody_waits_longer_than_a_step_of_its_own(schedule: Schedule) -> None:
    outcome = simulate(cluster(DiLoCo(period=schedule), speeds=SPEEDS, steps=300, **FAST))
    whole = [by_worker for by_worker in ends(outcome).values() if len(by_worker) == len(SPEEDS)][2:-1]
    assert len(whole) >= 5
    for by_worker in whole:
        last = max(by_worker.values())
        assert by_worker[0] == pytest.approx(last)  # the fastest does not wait at all
        for worker, speed in enumerate(SPEEDS):
            assert last - by_worker[worker] < STEP_S / speed


def test_the_fast_worker_of_20_and_100_ms_waits_less_than_a_tenth_of_its_time() -> None:
    def share(schedule: Schedule) -> float:
        run = cluster(DiLoCo(period=schedule), speeds=(1, 0.2), steps=1000, step_time_s=0.02)
        return waiting(simulate(run, timing_only=True), 0)

    assert share(Every(period=100)) == pytest.approx(0.8, abs=0.01)  # 2 of 10 seconds
    assert share(DyLU(period=100)) < 0.1
    assert share(Timed(seconds=2.0)) < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_steps_that_jitter_are_waited_for_but_phases_do_not_drift(seed: int) -> None:
    speeds = (1.0, 0.8, 0.7, 0.55, 0.5, 0.4, 0.3, 0.2)
    run = cluster(DiLoCo(period=DyLU(period=80)), speeds=speeds, steps=2000, seed=seed, jitter=0.2, **FAST)
    outcome = simulate(run, timing_only=True)
    for worker, speed in enumerate(speeds):
        adapted = phases(outcome, worker)[3:20]
        assert sum(adapted) / len(adapted) == pytest.approx(80 * speed, rel=0.1, abs=1)
    assert waiting(outcome, 0) < 0.15


def test_whoever_slows_down_does_fewer_steps_and_more_when_it_is_well_again() -> None:
    slow = Event(kind="slow", at_s=10.0, until_s=50.0, worker=1, factor=0.25)
    run = cluster(DiLoCo(period=DyLU(period=40)), speeds=(1, 0.5), steps=1600, events=[slow], **FAST)
    outcome = simulate(run, timing_only=True)
    trained = [record for record in outcome.records if isinstance(record, Trained) and record.worker == 1]

    def steps_of(from_s: float, to_s: float) -> set[int]:
        """Return the lengths of the phases that lie in that time."""
        return {each.steps for each in trained if from_s < each.time_s - each.seconds and each.time_s < to_s}

    assert steps_of(2, 10) == {20}
    assert steps_of(30, 50) == {5}
    assert steps_of(60, 75) <= {19, 20}  # a mean that forgets comes near the new speed, never quite to it


def test_when_the_fastest_dies_the_next_one_does_the_whole_phase() -> None:
    run = cluster(
        DiLoCo(period=DyLU(period=40)),
        speeds=(0.5, 1, 0.25),
        steps=400,
        events=[crash(10.0, 1)],
        detection_s=1.0,
        **FAST,
    )
    outcome = simulate(run, timing_only=True)
    assert phases(outcome, 0)[3] == 20
    assert phases(outcome, 0)[-2] == 40
    assert 20 in phases(outcome, 2)


@pytest.mark.parametrize("rule", [DiLoCo, NoLoCo], ids=lambda rule: rule.name)
def test_a_newcomer_measures_itself_in_short_phases_and_fits_in(rule: type[SyncRule]) -> None:
    run = cluster(
        rule(period=DyLU(period=40)),
        speeds=(1, 0.5, 0.25),
        steps=300,
        events=[crash(1.0, 2), Event(kind="join", at_s=4.0, worker=2)],
        detection_s=0.5,
        patience_s=5.0,
        **FAST,
    )
    outcome = simulate(run, timing_only=True)
    came_s = [record.time_s for record in outcome.records if isinstance(record, Joined) and record.worker == 2][1]
    own = [
        record.steps
        for record in outcome.records
        if isinstance(record, Trained) and record.worker == 2 and record.time_s > came_s and record.samples
    ]
    assert own[0] == PROBE
    assert own[1] <= PROBE  # a quarter of ten; or it has not heard of the others yet
    assert own[2:4] == [10, 10]
    assert set(phases(outcome, 0)[3:8]) == {40}


class Liar(DiLoCo):
    """DiLoCo whose last worker claims an absurd speed, or something that is none, before each phase."""

    claim: str = "1e-30"

    async def run(self, peer: Peer) -> None:
        if peer.id == max(peer.cohort):
            peer.tell_speed = lambda: [peer.send(to, TOLD, signal(self.claim)) for to in (0, 1)] and None  # type: ignore[method-assign]
        await super().run(peer)


def lied(claim: str) -> Outcome:
    return simulate(cluster(Liar(period=DyLU(period=40, ratio=8), claim=claim), speeds=(1, 0.5, 1), steps=100, **FAST))


def test_a_lie_cannot_make_phases_shorter_than_the_ratio_allows() -> None:
    assert set(phases(lied("1e-30"), 0)[2:4]) == {5}  # 40 / 8


@pytest.mark.parametrize("claim", ["nan", "-1", "very fast"])
def test_nonsense_is_refused_and_the_others_go_by_each_other(claim: str) -> None:
    outcome = lied(claim)
    assert set(phases(outcome, 0)[2:3]) == {40}
    assert set(phases(outcome, 1)[2:4]) == {20}
    assert {(each.source, each.code) for each in outcome.records if isinstance(each, Refused)} == {(2, "codec")}


def test_the_same_run_is_the_same_to_the_bit() -> None:
    def records() -> Sequence[Any]:
        rule = DiLoCo(period=DyLU(period=20))
        return simulate(cluster(rule, speeds=SPEEDS, steps=60, jitter=0.2, seed=3)).records

    assert records() == records()


def test_one_worker_alone_does_whole_phases() -> None:
    outcome = simulate(cluster(DiLoCo(period=DyLU(period=20)), workers=1, steps=65))
    assert phases(outcome, 0) == [PROBE, 5, 20, 20, 17]
