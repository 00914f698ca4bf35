"""Schedules that follow the learning rate or the data: QSR (arXiv 2310.14423), growing phases, and their control."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from cluster import cluster, rounds

from decentral.inner import SGD, AdamW, Inner
from decentral.journal import Trained
from decentral.protocols import QSR, Growing, LocalSGD, MatchedRandom
from decentral.sim.simulate import simulate


def phases(schedule: Any, steps: int, inner: Inner | None = None, seed: int = 0) -> list[int]:
    """Return the phases of a run, after a look whether all its workers had the same."""
    run = cluster(LocalSGD(period=schedule), 2, steps, inner=inner, seed=seed)
    outcome = simulate(run, timing_only=True)
    first, second = (
        [record.steps for record in outcome.records if isinstance(record, Trained) and record.worker == worker]
        for worker in (0, 1)
    )
    assert first == second
    assert len(rounds(outcome)) == len(first)  # the last phase, too, ends on a round
    return first


@pytest.mark.parametrize(("lr", "expected"), [(0.008, 4), (0.004, 19), (0.002, 76), (0.001, 306), (0.0005, 1225)])
def test_the_papers_quotients(lr: float, expected: int) -> None:
    assert QSR().phase(0, 100_000, AdamW(lr=lr)) == expected
    assert QSR(alpha=0.0175 * 3).phase(0, 100_000, AdamW(lr=lr * 3)) == expected  # only the ratio counts


def test_without_growth_h_is_constant_and_with_very_much_there_is_one_round() -> None:
    assert phases(QSR(base=5, alpha=0.0), 23) == [5, 5, 5, 5, 3]
    assert phases(QSR(base=5, alpha=1e9), 23) == [23]


def test_phases_grow_as_the_learning_rate_falls_and_end_with_the_budget() -> None:
    inner = SGD(lr=0.1, schedule="cosine", final_lr_fraction=0.0)
    found = phases(QSR(base=2, alpha=0.2), 400, inner)
    assert sum(found) == 400
    whole = found[:-1]
    assert whole == sorted(whole)
    assert found[0] == 4
    starts = itertools.accumulate(found, initial=0)
    for start, phase in zip(starts, whole, strict=False):  # as long as the rate of its first step says
        assert phase == max(2, int((0.2 / inner.lr_at(start, 400)) ** 2))


def test_the_number_of_rounds_is_the_integral_of_one_over_h() -> None:
    inner = SGD(lr=0.1, schedule="cosine", final_lr_fraction=0.05)
    found = phases(QSR(base=2, alpha=0.2), 3000, inner)
    expected = sum(1 / max(2, int((0.2 / inner.lr_at(step, 3000)) ** 2)) for step in range(3000))
    assert len(found) == pytest.approx(expected, rel=0.03)


def test_during_the_warm_up_h_is_what_it_will_be_after_it() -> None:
    inner = SGD(lr=0.1, warmup_steps=10, schedule="cosine", final_lr_fraction=0.0)
    assert phases(QSR(base=1, alpha=0.2), 60, inner)[:3] == [4, 4, 4]
    assert phases(QSR(base=1, alpha=0.2), 8, SGD(lr=0.1, warmup_steps=8)) == [4, 4]


def test_growing_phases_follow_their_law() -> None:
    law = Growing(base=10, horizon=100, power=1.0, longest=35)
    assert [law.phase(step, 1000, SGD(lr=1.0)) for step in (0, 50, 100, 200, 900)] == [10, 15, 20, 30, 35]
    assert phases(Growing(base=3, power=0.0), 8) == [3, 3, 2]
    assert phases(Growing(base=1, horizon=1, power=1.0), 16) == [1, 2, 4, 8, 1]


@pytest.mark.parametrize("schedule", [Growing(base=1, horizon=5, power=1.0), QSR(base=2, alpha=0.2)])
def test_the_control_has_the_same_phases_in_another_order(schedule: Growing | QSR) -> None:
    inner = SGD(lr=0.1, schedule="cosine", final_lr_fraction=0.0)
    planned = phases(schedule, 200, inner)
    shuffled = [phases(MatchedRandom(schedule=schedule), 200, inner, seed=seed) for seed in (0, 1)]
    assert sorted(shuffled[0]) == sorted(shuffled[1]) == sorted(planned)
    assert shuffled[0] != planned
    assert shuffled[0] != shuffled[1]
    assert phases(MatchedRandom(schedule=schedule), 200, inner, seed=1) == shuffled[1]


def test_a_run_file_spells_them() -> None:
    rule = LocalSGD.model_validate({"period": {"name": "matched_random", "schedule": {"name": "qsr", "alpha": 0.3}}})
    assert rule.period == MatchedRandom(schedule=QSR(alpha=0.3))
    assert LocalSGD.model_validate({"period": rule.to_table()["period"]}) == rule
