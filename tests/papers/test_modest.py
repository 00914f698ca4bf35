"""MoDeST (arXiv 2302.13837): committees that all can work out, and rounds that survive whoever dies."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from cluster import all_equal, cluster, crash, quadratic, replicas

from decentral.config import Run
from decentral.journal import Synced, Trained
from decentral.outcome import Outcome
from decentral.protocols import LocalSGD, MoDeST
from decentral.protocols.codecs import E3M0
from decentral.protocols.modest.post import read, written
from decentral.protocols.modest.view import View, hash_order
from decentral.sim.simulate import simulate
from decentral.wire import FrameError


def averages(outcome: Outcome) -> list[Synced]:
    """Return the rounds' averages in order of time; `members` are the committee before."""
    found = [
        r for r in outcome.records if isinstance(r, Synced) and r.channel == "committee" and r.outcome != "skipped"
    ]
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


def test_if_a_whole_committee_dies_the_run_ends() -> None:
    rule = MoDeST(period=5, committee=2)
    quiet = averages(simulate(cluster(rule, 6, 20)))
    dead = quiet[1].members
    events = [crash(quiet[1].time_s - 0.2, worker) for worker in dead]
    outcome = simulate(cluster(rule, 6, 20, events=events, detection_s=0.3))
    assert sorted(outcome.params) == [worker for worker in range(6) if worker not in dead]
    assert outcome.seconds < 10


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
