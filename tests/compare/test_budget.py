"""As many local steps as the budget allows, no more."""

from __future__ import annotations

import math

import pytest
from cluster import cluster

from decentral.compare.budget import Equal, fitted, measured, most_steps
from decentral.config import Run
from decentral.errors import ConfigError
from decentral.fleet import Exponential
from decentral.protocols import DDP, DiLoCo, Gossip, LocalSGD, NoLoCo, SyncRule
from decentral.protocols.schedule import Every
from decentral.sim.simulate import simulate

RULES: tuple[SyncRule, ...] = (
    DDP(),
    DiLoCo(period=Every(period=7)),
    NoLoCo(period=Every(period=4)),
    Gossip(period=Every(period=3)),
)


@pytest.mark.parametrize("equal", ["seconds", "bytes"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_one_more_round_would_be_too_much(rule: SyncRule, equal: Equal) -> None:
    run = cluster(rule, 3, 10, jitter=0.3, up_bps=2e4, down_bps=2e4)
    budget = 3.3 * measured(run, equal)
    found = fitted(run, equal, budget)
    period = rule.period.period if isinstance(getattr(rule, "period", None), Every) else 1  # type: ignore[attr-defined]
    assert (
        0.99 * budget < measured(found, equal) <= budget
        or measured(found.model_copy(update={"steps": found.steps + period}), equal) > budget
    )


@pytest.mark.parametrize("costs", [lambda n: 3.0 * n, lambda n: 50 + 0.1 * n, lambda n: 4.0 * (n // 10), math.sqrt])
@pytest.mark.parametrize("budget", [60.0, 81.7])
def test_the_most_steps_are_found(costs: object, budget: float) -> None:
    assert callable(costs)
    steps = most_steps(costs, 10, budget, "seconds")
    assert 0.998 * budget <= costs(steps) <= budget or costs(steps) <= budget < costs(steps + 1)


def test_samples_are_counted_without_simulating() -> None:
    run = cluster(DDP(), 4, 30, batch_size=3)
    assert measured(run, "samples") == 30 * 4 * 3
    alone = cluster(LocalSGD(), 1, 30, batch_size=3)
    assert fitted(alone, "samples", measured(run, "samples")).steps == 120
    assert fitted(run, "samples", 12 * 7 + 11).steps == 7


def test_what_is_trained_takes_what_was_measured() -> None:
    run = cluster(
        DiLoCo(period=Every(period=5)), 3, 20, churn=Exponential(rate_per_hour=120.0, reacquire_s=5.0), step_time_s=1.0
    )
    found = fitted(run, "seconds", 47.0)
    assert found.steps != run.steps
    assert simulate(found).seconds == pytest.approx(measured(found, "seconds"), abs=1e-9)


@pytest.mark.parametrize(
    ("run", "equal", "budget", "words"),
    [
        (cluster(DDP()), "seconds", 1e-6, "not one local step fits into a budget of 1e-06 seconds"),
        (cluster(DDP()), "samples", 3, "not one local step fits"),
        (cluster(DDP()), "bytes", 1e12, "more than 1000 times the run file's 12 local steps"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(run: Run, equal: Equal, budget: float, words: str) -> None:
    with pytest.raises(ConfigError, match="--equal") as refused:
        fitted(run, equal, budget)
    assert words in str(refused.value)


def test_steps_that_cost_nothing_have_no_budget() -> None:
    with pytest.raises(ConfigError, match="24 local steps take no more bytes than 12"):
        most_steps(lambda _steps: 5.0, 10, 6.0, "bytes")
    with pytest.raises(ConfigError, match="more than 1000 times"):
        most_steps(lambda _steps: 0.0, 10, 6.0, "bytes")


def test_who_has_nobody_to_talk_to_keeps_its_steps_under_a_budget_of_bytes() -> None:
    alone = cluster(LocalSGD(), 1, 30)
    assert fitted(alone, "bytes", 10.0) == alone
