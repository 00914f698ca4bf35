"""Models of preemption against what probability says of them, and their fit against the traces' own figures."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from decentral.errors import ConfigError
from decentral.fleet import Fleet, WorkerGroup
from decentral.fleet.churn import Churn, Exponential, Preemption, StageLosses
from decentral.fleet.fit import drawn, fit, losses_of
from decentral.fleet.traces import Change, read_trace
from decentral.fleet.units import HOUR_S

LONG_S = 20_000 * HOUR_S


@pytest.mark.parametrize("machines", [1, 2, 16])
def test_a_machine_is_lost_at_the_rate_however_many_there_are(machines: int) -> None:
    model = Preemption(rate_per_hour=0.6, group_mean=3, reacquire_s=600)
    losses = losses_of(drawn(model, machines, 0, LONG_S / machines))
    assert losses.rate_per_hour == pytest.approx(0.6, rel=0.04)
    quantiles = np.percentile(losses.lives_s, [10, 50, 90])  # of an exponential life
    assert quantiles == pytest.approx([-math.log(1 - share) * HOUR_S / 0.6 for share in (0.1, 0.5, 0.9)], rel=0.06)


def test_groups_follow_the_geometric_law() -> None:
    model = Preemption(rate_per_hour=0.6, group_mean=2, reacquire_s=60)
    changes = drawn(model, 64, 1, LONG_S / 64)
    sizes = Counter(Counter(change.at_s for change in changes if not change.came).values())
    groups = sum(sizes.values())
    for size in range(1, 6):
        assert sizes[size] / groups == pytest.approx(0.5**size, abs=4 * math.sqrt(0.5**size / groups))
    assert losses_of(changes).group_share == pytest.approx(1 - 1 / 2**2, abs=0.02)


def test_independent_machines_die_one_by_one() -> None:
    losses = losses_of(drawn(Exponential(rate_per_hour=0.5, reacquire_s=1800), 16, 0, LONG_S / 16))
    assert losses.largest_group == 1
    assert losses.rate_per_hour == pytest.approx(0.5, rel=0.04)
    assert losses.vacancy_s == pytest.approx(1800, rel=0.05)


def test_a_group_is_of_one_site() -> None:
    churn = Preemption(rate_per_hour=0.6, group_mean=4, reacquire_s=600)
    sites = ["east"] * 8 + ["west"] * 8
    events = [event for event, _ in zip(churn.events(sites, 0), range(3000), strict=False) if event.kind == "preempt"]
    at_once: dict[float, set[str]] = {}
    for event in events:
        assert event.worker is not None
        at_once.setdefault(event.at_s, set()).add(sites[event.worker])
    assert {len(group) for group in at_once.values()} == {1}
    assert len(at_once) < len(events)


@pytest.mark.parametrize(
    "churn",
    [
        Preemption(rate_per_hour=3, group_mean=2.5, reacquire_s=200, notice_s=120),
        Exponential(rate_per_hour=3, reacquire_s=200, notice_s=120),
    ],
)
def test_a_machine_comes_back_only_after_it_has_gone(churn: Churn) -> None:
    gone_at: dict[int | None, float] = {}
    for event, _ in zip(churn.events([None] * 6, 5), range(2000), strict=False):
        if event.kind == "join":
            assert event.at_s >= gone_at.pop(event.worker)
        else:
            assert event.worker not in gone_at
            assert event.gone_at_s == event.at_s + 120
            gone_at[event.worker] = event.gone_at_s


def test_without_replacement_everybody_goes_once() -> None:
    events = list(Preemption(rate_per_hour=1, group_mean=2).events([None] * 20, 0))
    assert sorted(event.worker for event in events if event.worker is not None) == list(range(20))
    assert {event.kind for event in events} == {"preempt"}


def test_fitting_what_a_model_drew_gives_the_model() -> None:
    model = Preemption(rate_per_hour=0.6, group_mean=2.1, reacquire_s=2200)
    fitted = fit(drawn(model, 32, 2, 800 * HOUR_S))
    assert fitted.rate_per_hour == pytest.approx(model.rate_per_hour, rel=0.04)
    assert fitted.group_mean == pytest.approx(model.group_mean, rel=0.04)
    assert fitted.reacquire_s == pytest.approx(model.reacquire_s, rel=0.06)


def test_figures_of_a_trace_by_hand() -> None:
    # Two machines from 0 on. Both go at 100 s; one comes at 160 s and goes at 200 s; the other place stays empty.
    changes = [
        Change(0, True, "a"),
        Change(0, True, "b"),
        Change(100, False, "a"),
        Change(100, False, "b"),
        Change(160, True, "c"),
        Change(200, False, "c"),
    ]
    losses = losses_of(changes)
    assert losses.rate_per_hour == pytest.approx(3 / 240 * HOUR_S)
    assert (losses.group_share, losses.group_mean, losses.largest_group) == (pytest.approx(2 / 3), 1.5, 2)
    assert losses.lives_s == (40, 100, 100)
    assert losses.vacancy_s == 60 * 2 + 40 * 1


@pytest.mark.parametrize(
    ("source", "rate", "group_share", "mean", "largest", "median_h"),
    [("bamboo:p3", 0.61, 0.77, 2.1, 6, 0.98), ("bamboo:g4dn", 0.55, 0.58, 1.5, 5, 1.02)],
)
def test_the_model_fits_the_spot_traces(
    source: str, rate: float, group_share: float, mean: float, largest: int, median_h: float
) -> None:
    changes = read_trace(source)
    losses = losses_of(changes)
    assert losses.rate_per_hour == pytest.approx(rate, abs=0.005)
    assert losses.group_share == pytest.approx(group_share, abs=0.005)
    assert losses.group_mean == pytest.approx(mean, abs=0.05)
    assert losses.largest_group == largest
    assert losses.lives_s[len(losses.lives_s) // 2] / HOUR_S == pytest.approx(median_h, abs=0.01)
    # Groups of the geometric law with that mean have the trace's share, which nobody has fitted.
    long = losses_of(drawn(fit(changes), 32, 0, 400 * HOUR_S))
    assert long.group_share == pytest.approx(losses.group_share, abs=0.03)


def test_a_trace_without_losses_cannot_be_fitted() -> None:
    with pytest.raises(ConfigError, match="loses no machine"):
        fit([Change(0, True, "a"), Change(5, True, "b")])


def test_late_groups_and_churn_are_refused_together() -> None:
    fleet = Fleet(workers=(WorkerGroup(start_s=5),), churn=Exponential(rate_per_hour=1))
    with pytest.raises(ConfigError, match=r"fleet\.churn: it says when workers come, and start_s"):
        fleet.check()


@pytest.mark.parametrize("per_hour", [0.05, 0.16])
def test_a_stage_is_lost_within_an_iteration_with_the_probability_that_makes_its_hourly_one(per_hour: float) -> None:
    """p = 1 - (1 - h)^(T / 3600), in every replica at once, and never a stage that is spared."""
    churn = StageLosses(per_hour=per_hour, stages=6, spared=(0,), restart_s=1e-3)
    iteration_s, iterations = 91.35, 20_000
    lost, by_time = Counter[int](), dict[float, set[int]]()
    for event in churn.events([None] * 18, 0):
        if event.at_s > iterations * iteration_s:
            break
        assert event.worker is not None
        if event.kind == "preempt":
            lost[event.worker % 6] += 1
            by_time.setdefault(event.at_s, set()).add(event.worker)
    assert all(len(workers) == 3 and len({worker % 6 for worker in workers}) == 1 for workers in by_time.values())
    chance = 1 - (1 - per_hour) ** (iteration_s / HOUR_S)
    expected, spread = iterations * chance, math.sqrt(iterations * chance * (1 - chance))
    assert lost.keys() == {1, 2, 3, 4, 5}
    assert all(count / 3 == pytest.approx(expected, abs=4 * spread) for count in lost.values())


@pytest.mark.parametrize(
    ("fields", "workers", "message"),
    [
        ({"stages": 4}, 6, "fleet.churn.stages: 4 workers make a replica, and the fleet has 6"),
        ({"stages": 2, "spared": (0, 1)}, 4, "name some of the stages 0 to 1, not all"),
        ({"stages": 2, "spared": (2,)}, 4, "name some of the stages 0 to 1, not all"),
    ],
)
def test_stages_that_a_fleet_has_not_are_refused(fields: dict[str, Any], workers: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StageLosses(per_hour=0.1, **fields).check([None] * workers)
