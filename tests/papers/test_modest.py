"""MoDeST (arXiv 2302.13837): committees that all can work out, and rounds that survive whoever dies."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter

import pytest
import torch
from cluster import all_equal, cluster, crash, drive, quadratic, replicas

from decentral.config import Run
from decentral.fleet import Fleet, WorkerGroup
from decentral.journal import Synced, Trained
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.protocols import LocalSGD, MoDeST
from decentral.protocols.codecs import E3M0, Float32
from decentral.protocols.modest.aggregator import Aggregator
from decentral.protocols.modest.answering import keep_answering
from decentral.protocols.modest.member import Calls, Start
from decentral.protocols.modest.post import Post, read, written
from decentral.protocols.modest.view import View, hash_order
from decentral.protocols.modest.watch import Watch
from decentral.sim.simulate import simulate
from decentral.wire import FrameError


def averages(outcome: Outcome) -> list[Synced]:
    """Return the rounds' averages in order of time; `members` are the committee before."""
    found = [record for record in outcome.records if isinstance(record, Synced) and record.channel == "committee"]
    return sorted(found, key=lambda record: record.time_s)


# -- committees -------------------------------------------------------------------------------------------------------


def test_one_departure_changes_one_member_and_keeps_the_order() -> None:
    for round_ in range(1, 50):
        whole = hash_order(range(20), round_, 7)
        gone = whole[round_ % 20]
        assert hash_order(set(range(20)) - {gone}, round_, 7) == [worker for worker in whole if worker != gone]
    assert hash_order(range(20), 1, 7) != hash_order(range(20), 1, 8)


def test_committees_are_uniform() -> None:
    """20 workers, committees of 4 in 2,000 rounds: chi-square of 19 degrees of freedom below its 99.9 % quantile, 43.8.

    Members of one committee exclude each other, which makes the statistic smaller by 16 / 19.
    """
    counts = Counter(itertools.chain(*(hash_order(range(20), round_, 3)[:4] for round_ in range(2000))))
    assert sum((count - 400) ** 2 / 400 for count in counts.values()) < 43.8
    pairs = {tuple(hash_order(range(20), round_, 3)[:2]) for round_ in range(2000)}
    assert len(pairs) > 370


def test_views_merge_in_any_order_and_as_often_as_one_likes() -> None:
    views = [View((2, 5, 9)) for _ in range(3)]
    views[0].saw(2, 4)
    views[0].left(5)
    views[1].saw(5, 7)
    views[1].left(5)
    views[1].joined(5)
    views[2].saw(2, 9)
    tables = [view.table.clone() for view in views]
    results = []
    for order in itertools.permutations(range(3)):
        merged = View((2, 5, 9))
        for index in (*order, order[0]):
            merged.merge(tables[index])
        results.append(merged.table)
    assert all(torch.equal(result, results[0]) for result in results)
    assert results[0].tolist() == [[9, 0], [7, 2], [0, 0]]
    assert torch.equal(views[0].table, tables[0])


def test_who_has_left_or_was_never_seen_for_long_is_not_asked() -> None:
    view = View(range(4))
    view.left(1)
    view.left(1)
    view.saw(2, 40)
    assert sorted(view.order(30, 0, 30)) == [0, 2, 3]
    assert view.order(60, 0, 30) == [2]
    view.joined(1)
    assert sorted(view.order(30, 0, 30)) == [0, 1, 2, 3]


# -- rounds -----------------------------------------------------------------------------------------------------------


def reference(run: Run, outcome: Outcome, period: int) -> torch.Tensor:
    """Return the last mean, from the committees of the journal."""
    task = quadratic(run)
    model = torch.full((16,), task.start)
    for record in averages(outcome):
        model = torch.stack([task.after_sgd(k, 0.1, period, x0=model) for k in record.members]).mean(dim=0)
    return model


@pytest.mark.parametrize(("workers", "committee"), [(8, 3), (5, 1), (4, 9)])
def test_it_equals_the_means_of_its_committees(workers: int, committee: int) -> None:
    run = cluster(MoDeST(period=5, committee=committee), workers, 20)
    outcome = simulate(run)
    found = averages(outcome)
    assert [record.round for record in found] == list(range(2, 2 + len(found)))
    assert Counter(itertools.chain(*(record.members for record in found))) == dict.fromkeys(range(workers), 4)
    assert all(len(record.members) == min(committee, workers) for record in found[:-3])
    assert all_equal(outcome)
    assert torch.allclose(outcome.params[0], reference(run, outcome, 5), atol=1e-5)


def test_a_committee_of_all_is_local_sgd() -> None:
    modest = simulate(cluster(MoDeST(period=5, committee=4), 4, 40))
    local = simulate(cluster(LocalSGD(period=5), 4, 40))
    assert torch.allclose(replicas(modest), replicas(local), atol=2e-6)


@pytest.mark.parametrize("before_s", [0.001, 0.06, 0.2])
def test_a_dead_aggregator_costs_a_deadline_and_no_round(before_s: float) -> None:
    """It dies with the models in hand, while they come, and before it is asked."""
    rule = MoDeST(period=5, committee=3)
    quiet = averages(simulate(cluster(rule, 8, 20)))
    event = crash(quiet[2].time_s - before_s, quiet[2].worker)
    run = cluster(rule, 8, 20, events=[event], detection_s=0.4)
    outcome = simulate(run)
    found = averages(outcome)
    assert sorted(outcome.params) == [worker for worker in range(8) if worker != quiet[2].worker]
    assert {record.step for record in outcome.left() if record.reason == "finished"} == {20}
    assert sorted({record.round for record in found}) == list(range(2, 2 + len({record.round for record in found})))
    assert all_equal(outcome)
    assert outcome.seconds < 20


def test_a_dead_member_is_not_waited_for() -> None:
    rule = MoDeST(period=5, committee=3)
    quiet = averages(simulate(cluster(rule, 8, 20)))
    member = next(worker for worker in quiet[2].members if worker != quiet[2].worker and worker != quiet[1].worker)
    outcome = simulate(cluster(rule, 8, 20, events=[crash(quiet[2].time_s - 0.15, member)], detection_s=0.4))
    assert averages(outcome)[2].outcome == "degraded"
    assert averages(outcome)[2].time_s < quiet[2].time_s + 1
    assert all_equal(outcome)


def test_a_share_of_the_models_is_enough() -> None:
    """With a straggler of a tenth of the speed a committee of four goes on with three."""
    speeds = [1, 1, 1, 1, 0.1, 1]
    outcome = simulate(cluster(MoDeST(period=5, committee=4, success=0.75), steps=20, speeds=speeds))
    slow = [record for record in outcome.records if isinstance(record, Trained) and record.worker == 4]
    assert slow
    assert all(4 not in record.members for record in averages(outcome)[:4])
    assert all_equal(outcome)


# -- whoever dies, and whether or not anybody notices -----------------------------------------------------------------

NEVER_S = 1e5
"""A death that is noticed so late is noticed after the run."""


class Limited(MoDeST):
    """MoDeST that fails if it has not ended after 500 virtual seconds."""

    async def run(self, peer: Peer) -> None:
        await asyncio.wait_for(super().run(peer), 500)


def hurried(**fields: float) -> Limited:
    """Return MoDeST with phases of 5 steps and short deadlines."""
    return Limited(period=5, ping_s=0.5, aggregation_s=3.0, **fields)


def assert_survived(outcome: Outcome, survivors: set[int], steps: int = 20) -> None:
    """Assert that these finished, besides whoever had finished before its crash was due, all with the same model."""
    finished = {record.worker: record.step for record in outcome.left() if record.reason == "finished"}
    assert survivors <= finished.keys()
    assert set(finished.values()) == {steps}
    assert all_equal(outcome)


@pytest.mark.parametrize("detection_s", [0.0, 0.4, 60.0, NEVER_S])
@pytest.mark.parametrize("gap_s", [0.0, 0.03, 0.5])
@pytest.mark.parametrize("seed", range(6))
def test_80_percent_may_die_at_any_moment(seed: int, gap_s: float, detection_s: float) -> None:
    """8 of 10, at once or one after the other, from a moment of the first 9 s on (all would take 7 to 46 s)."""
    chance = random.Random(f"{detection_s} {gap_s} {seed}")
    rule = hurried(committee=chance.choice([1, 2, 4]), success=chance.choice([0.5, 1.0]))
    dead, at_s = chance.sample(range(10), 8), 1.5 * (seed + chance.random())
    events = [crash(at_s + gap_s * place, worker) for place, worker in enumerate(dead)]
    speeds = [chance.choice([1, 1, 0.5, 0.2]) for _ in range(10)]
    run = cluster(rule, steps=20, speeds=speeds, events=events, detection_s=detection_s, seed=seed)
    assert_survived(simulate(run), set(range(10)) - set(dead))


@pytest.mark.parametrize("detection_s", [0.3, NEVER_S])
def test_if_a_whole_committee_dies_the_others_take_up(detection_s: float) -> None:
    rule = hurried(committee=2)
    quiet = averages(simulate(cluster(rule, 12, 20)))
    dead = quiet[4].members
    events = [crash(quiet[4].time_s - 0.2, worker) for worker in dead]
    outcome = simulate(cluster(rule, 12, 20, events=events, detection_s=detection_s))
    assert_survived(outcome, set(range(12)) - set(dead))
    found = averages(outcome)
    assert [record.round for record in found] == list(range(2, 2 + len(found)))


def test_one_model_is_enough_when_time_is_up() -> None:
    rule = hurried(committee=4)
    quiet = averages(simulate(cluster(rule, 8, 20)))
    alive, *dead = sorted(quiet[2].members, key=lambda worker: worker != quiet[2].worker)
    events = [crash(quiet[2].time_s - 0.2, worker) for worker in dead if worker != quiet[1].worker]
    outcome = simulate(cluster(rule, 8, 20, events=events, detection_s=NEVER_S))
    assert averages(outcome)[2].outcome == "degraded"
    assert averages(outcome)[2].members == tuple(sorted(set(quiet[2].members) - {event.worker for event in events}))
    assert averages(outcome)[2].time_s < quiet[2].time_s + rule.aggregation_s + 4 * rule.ping_s
    assert_survived(outcome, {alive})


@pytest.mark.parametrize("detection_s", [0.3, NEVER_S])
def test_who_has_the_last_mean_passes_it_on_if_its_sender_dies(detection_s: float) -> None:
    """The last aggregator dies while its mean is on its way: it is with those that have quick links alone."""
    groups = tuple(WorkerGroup(down_bps=bps) for bps in (1e6, 1e6, 3e5, 3e5, 1e5, 1e5))
    task = {"name": "quadratic", "dimension": 2000}
    quiet_run = cluster(hurried(committee=3), 6, 20, task=task, seed=18)
    quiet_run = quiet_run.model_copy(update={"fleet": Fleet(workers=groups)})
    last = averages(simulate(quiet_run))[-1]
    assert not {4, 5} & {*last.members, last.worker}  # else who does not hear of the end makes the same mean again
    for before_s in (0.01, 0.1, 0.2, 0.3, 0.5, 0.8):
        fleet = Fleet(workers=groups, events=(crash(last.time_s - before_s, last.worker),), detection_s=detection_s)
        outcome = simulate(quiet_run.model_copy(update={"fleet": fleet}))
        assert_survived(outcome, set(range(6)) - {last.worker})


def test_an_aggregator_that_the_others_have_left_behind_ends_nothing() -> None:
    """It has no steps left and its round is stale for all whom it asks; it learns which is the newest."""

    async def script(peer: Peer) -> tuple[int, bool]:
        post = Post(peer, Float32(), ping_s=0.5, inactivity=1000)
        calls = Calls(post, (0,), patience_s=2.0)
        aggregator = Aggregator(post, calls, size=2, success=1.0, timeout_s=1.0)
        for role in ("train", "average", "work"):
            peer.spawn(keep_answering(role, post, calls, aggregator))
        peer.spawn(Watch(post, calls, size=2, quiet_s=100.0).keep())
        peer.spawn(calls.hear_the_end())
        if peer.id == 0:
            await peer.train(peer.steps_left)
            aggregator.add_own(Start(1, (0,), None))
        else:
            calls.learn(5, (1, 2))
        await asyncio.sleep(5)
        return calls.newest, calls.over

    assert drive(script) == dict.fromkeys(range(4), (5, False))


def test_an_aggregator_takes_no_more_models_than_a_committee_has() -> None:
    """All others may offer theirs when a committee has died; who has a promise keeps it."""

    async def script(peer: Peer) -> list[bool]:
        post = Post(peer, Float32(), ping_s=0.5, inactivity=1000)
        aggregator = Aggregator(post, Calls(post, (0,), patience_s=2.0), size=2, success=1.0, timeout_s=1.0)
        return [aggregator.begin(2, (0, 1), source) for source in (3, 1, 2, 3, 0)]

    assert list(drive(script).values()) == 4 * [[True, True, False, True, False]]


def test_who_trains_for_long_is_not_disturbed() -> None:
    """In a phase of 2.5 s idle workers ask six times whether somebody is at work."""
    patient, hasty = (
        simulate(cluster(MoDeST(period=50, committee=2, aggregation_s=seconds), 6, 100)) for seconds in (300.0, 0.4)
    )
    assert [(r.round, r.members) for r in averages(hasty)] == [(r.round, r.members) for r in averages(patient)]
    assert torch.equal(hasty.merged(), patient.merged())
    sent = [sum(left.messages_sent for left in outcome.left()) for outcome in (patient, hasty)]
    assert sent[1] > sent[0]  # they did ask


def test_e3m0_sends_less() -> None:
    task = {"name": "quadratic", "dimension": 2000}
    small, large = (
        sum(record.sent_bytes for record in simulate(cluster(rule, 6, 20, task=task)).left())
        for rule in (MoDeST(period=5, committee=3, codec=E3M0()), MoDeST(period=5, committee=3))
    )
    assert small < 0.4 * large


def test_a_question_that_names_no_round_is_refused() -> None:
    assert read(written(17, (3, 5))) == (17, (3, 5))
    assert read(written(2, ())) == (2, ())
    for text in ("", "x", "3 -1", "1.5", "7 a"):
        with pytest.raises(FrameError, match="names no round"):
            read(text)
