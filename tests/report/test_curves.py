"""What a run had used up at each evaluation, against what its records say."""

from __future__ import annotations

import json

import pytest
from cluster import NET, cluster, crash

from decentral.fleet import Event, WorkerGroup
from decentral.journal import Evaluated, Synced, Trained
from decentral.outcome import Outcome
from decentral.protocols import DDP, LocalSGD, SingleMerge
from decentral.protocols.schedule import Every
from decentral.report.curves import Curve, curve_of
from decentral.sim.simulate import simulate


def outcome_of(rule: object, **options: object) -> Outcome:
    run = cluster(rule, 3, 12, task=NET, **options)  # type: ignore[arg-type]
    return simulate(run.model_copy(update={"evaluate_every": 4}))


def test_points_are_the_evaluations_and_what_the_records_before_them_say() -> None:
    outcome = outcome_of(DDP())
    curve = curve_of(outcome, "loss")
    seen = [record for record in outcome.records if isinstance(record, Evaluated)]
    assert [(point.steps, point.seconds) for point in curve.points] == [(each.step, each.time_s) for each in seen]
    assert [point.value for point in curve.points] == [each.metrics["loss"] for each in seen]
    for point in curve.points:
        before = [record for record in outcome.records if record.time_s <= point.seconds]
        assert point.samples == sum(record.samples for record in before if isinstance(record, Trained))
        rounds = [record.sent_bytes for record in before if isinstance(record, Synced) and record.worker == 0]
        assert point.bytes == pytest.approx(3 * max(rounds, default=0), rel=0.1)


def test_the_end_is_the_merged_model_and_all_that_was_used() -> None:
    outcome = outcome_of(LocalSGD(period=Every(period=4)))
    end = curve_of(outcome, "loss").end
    assert (end.value, end.seconds, end.steps) == (outcome.after["loss"], outcome.seconds, 12)
    assert end.samples == outcome.samples() == 36
    assert end.bytes == sum(left.sent_bytes for left in outcome.left())
    assert end.dollars is None, "nobody has said what machines cost"


def test_whoever_comes_back_goes_on_where_its_first_stay_ended() -> None:
    """Rent ends with a crash and begins with the return; bytes and samples of both stays count."""
    events = [crash(0.21, 2), Event(at_s=0.35, worker=2, kind="join")]
    run = cluster(LocalSGD(period=Every(period=2)), 3, 12, task=NET, events=events, detection_s=0.01)
    groups = (WorkerGroup(count=3, dollars_per_hour=3600.0),)
    outcome = simulate(run.model_copy(update={"fleet": run.fleet.model_copy(update={"workers": groups})}))
    assert len(outcome.left()) == 4
    end = curve_of(outcome, "loss").end
    assert outcome.accounts is not None
    assert end.samples == outcome.samples()
    assert end.bytes == sum(left.sent_bytes for left in outcome.left())
    assert end.dollars == outcome.accounts.dollars


def test_a_curve_survives_json() -> None:
    curve = curve_of(outcome_of(SingleMerge(period=4, rate=0.5, evaluate_merged=2)), "loss")
    assert list(curve.looks) == ["mean of workers"]
    assert Curve.from_fields(json.loads(json.dumps(curve.to_fields()))) == curve
