"""Forecasts against whole runs, simulated to their end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from works import STACK, UNEQUAL, work

from decentral.config import Run
from decentral.outcome import Outcome
from decentral.plan import Work
from decentral.plan.candidates import runs_of
from decentral.plan.churn import forecast_with_churn
from decentral.plan.forecast import ENDLESS_S, forecast
from decentral.plan.shrink import SIZE, shrunk
from decentral.protocols import (
    CO2,
    DDP,
    DiLoCo,
    Every,
    Float32,
    HierarchicalDiLoCo,
    Int8,
    LocalSGD,
    NoLoCo,
    StreamingDiLoCo,
    SyncRule,
)
from decentral.sim.simulate import simulate

SITES = [
    {"count": 2, "site": "aws:us-east-1", "dollars_per_hour": 2.0},
    {"count": 2, "site": "gcp:us-central1-a", "dollars_per_hour": 1.0},
]
CHURN = {"name": "preemption", "rate_per_hour": 1.0, "group_mean": 1.5, "reacquire_s": 900.0}


def run_of(given: Work, rule: SyncRule) -> Run:
    ((_, run),) = runs_of(given, given.run.fleet, [rule])
    return run


def whole(run: Run) -> Outcome:
    return simulate(run.model_copy(update={"patience_s": ENDLESS_S}), timing_only=True)


@pytest.mark.parametrize(
    "rule",
    [
        DDP(),
        DiLoCo(period=Every(period=7), codec=Int8()),
        LocalSGD(period=Every(period=100), codec=Float32()),
        StreamingDiLoCo(period=24, all_reduce="butterfly"),
        HierarchicalDiLoCo(period=Every(period=5), rounds=3),
        CO2(period=Every(period=11)),
    ],
    ids=lambda rule: rule.name,
)
@pytest.mark.parametrize("groups", [3, UNEQUAL], ids=["equal", "unequal"])
def test_rounds_that_are_alike_take_as_long_as_all_of_them(rule: SyncRule, groups: Any) -> None:
    given = work(groups, steps=400)
    told, came = forecast(run_of(given, rule), given), whole(run_of(given, rule))
    assert told.seconds == pytest.approx(came.seconds, rel=1e-5)  # round numbers of more digits are longer to send
    assert told.sent_bytes == pytest.approx(sum(left.sent_bytes for left in came.left()), rel=1e-3)
    accounts = came.accounts
    assert accounts is not None
    computing = sum(each.compute_s for each in accounts.workers) / sum(each.rented_s for each in accounts.workers)
    assert told.computing == pytest.approx(computing, rel=1e-4)


def test_machines_and_traffic_between_sites_are_paid_for() -> None:
    given = work(SITES, steps=800, prices={"egress_dollars_per_gb": 900.0})
    run = run_of(given, DiLoCo(period=Every(period=10)))
    told, came = forecast(run, given), whole(run).accounts
    assert came is not None
    assert came.dollars is not None
    assert came.egress_dollars is not None
    assert came.egress_dollars > 0.1 * came.dollars
    assert told.dollars == pytest.approx(came.dollars + came.egress_dollars, rel=1e-3)
    assert told.seconds == pytest.approx(came.seconds, rel=1e-5)


@pytest.mark.parametrize(
    "rule", [DDP(), DiLoCo(period=Every(period=10)), NoLoCo(period=Every(period=10))], ids=lambda rule: rule.name
)
def test_what_chance_does_is_averaged(rule: SyncRule) -> None:
    given = work(UNEQUAL, steps=600, jitter=0.3)
    told, came = forecast(run_of(given, rule), given), whole(run_of(given, rule))
    assert told.seconds == pytest.approx(came.seconds, rel=0.03)


def test_a_short_run_is_simulated_whole() -> None:
    given = work(3, steps=23)
    for rule in (DiLoCo(period=Every(period=50)), StreamingDiLoCo(period=10)):
        assert forecast(run_of(given, rule), given).seconds == whole(run_of(given, rule)).seconds


@pytest.mark.parametrize(
    "rule",
    [
        DDP(),
        DiLoCo(period=Every(period=3), codec=Int8()),
        StreamingDiLoCo(period=6, all_reduce="butterfly"),
        NoLoCo(period=Every(period=3)),
    ],
    ids=lambda rule: rule.name,
)
def test_a_large_model_is_simulated_small(rule: SyncRule) -> None:
    task = {**STACK, "parameters": 6.0 * SIZE}
    given = work(UNEQUAL, steps=12, task=task, up_bps=5e8, down_bps=5e8, latency_s=0.01)
    run = run_of(given, rule)
    _, share = shrunk(run, given)
    assert share == pytest.approx(1 / 6, rel=1e-6)
    told, came = forecast(run, given), whole(run)
    assert told.seconds == pytest.approx(came.seconds, rel=0.02)
    assert told.sent_bytes == pytest.approx(sum(left.sent_bytes for left in came.left()), rel=0.01)


@pytest.mark.parametrize(
    "rule", [DiLoCo(period=Every(period=20)), NoLoCo(period=Every(period=20))], ids=lambda rule: rule.name
)
def test_machines_that_come_and_go(rule: SyncRule) -> None:
    """The long run has as many steps as the plan would give it, and is judged by the useful samples that it has."""
    given = work(8, steps=4000, churn=CHURN)
    run = run_of(given, rule)
    told = forecast_with_churn(run, given)
    calm = forecast(run.model_copy(update={"fleet": run.fleet.model_copy(update={"churn": None})}), given)
    assert told.seconds > 1.05 * calm.seconds
    came = simulate(run.model_copy(update={"steps": round(told.stretch * run.steps)}), timing_only=True)
    assert came.accounts is not None
    useful = sum(each.useful_samples for each in came.accounts.workers)
    assert told.seconds == pytest.approx(came.seconds * given.samples / useful, rel=0.07)


def test_without_churn_nothing_is_added() -> None:
    given = work(3)
    run = run_of(given, DiLoCo(period=Every(period=20)))
    assert forecast_with_churn(run, given) == forecast(run, given)
    assert replace(given, samples=1).steps(3) == 1
