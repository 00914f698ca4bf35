"""Runs that are timed without messages, and what they must agree with: the same runs by messages."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from decentral.config import Run, validated
from decentral.journal import Left, Record, Trained
from decentral.outcome import Outcome
from decentral.sim.lean.timetable import Timetable
from decentral.sim.simulate import simulate
from decentral.sim.watch import Watch


def make_run(rule: object, **fields: Any) -> Run:
    table = {"steps": 30, "task": {"name": "quadratic", "dimension": 4096}, "inner": {"name": "sgd", "lr": 0.1}}
    return validated({**table, "rule": rule, **fields}, "test")


def lean(run: Run) -> Outcome:
    outcome = simulate(run, timing_only=True)
    assert isinstance(outcome.records, Timetable)
    return outcome


def by_messages(run: Run) -> Outcome:
    outcome = simulate(run, timing_only=True, watch=Watch(links=True))
    assert isinstance(outcome.records, list)
    return outcome


def draw_fleet(rng: random.Random) -> dict[str, Any]:
    """Draw a fleet of two kinds of workers, alike or not, on thick or thin lines, in step or drifting apart."""
    groups = [
        {
            "count": rng.randint(1, 5),
            "speed": rng.choice([1.0, 0.9, 0.3]),
            "up_bps": rng.choice([2e6, 1e8, 1e8]),
            "down_bps": rng.choice([3e6, 1e8]),
            **rng.choice([{}, {"stalls": {"per_hour": 3000.0, "duration_s": 0.3}}]),
        }
        for _ in range(2)
    ]
    groups[1] |= rng.choice([{}, {"site": "home"}])
    links = {"jitter_s": rng.choice([0.0, 0.01]), **rng.choice([{}, {"bps": 5e6}])}
    return {"workers": groups, "jitter": rng.choice([0.0, 0.0, 0.1, 0.5]), "network": {"links": [links]}}


def check_equal(one: Outcome, other: Outcome, within_s: float = 0.0) -> None:
    """Assert that records, traffic and accounts are equal; sums of many seconds may differ by their roundings.

    Times may differ by `within_s` seconds.
    """
    assert one.seconds == pytest.approx(other.seconds, rel=0, abs=within_s)
    for record, expected in zip(_of_workers(one), _of_workers(other), strict=True):
        if isinstance(record, Left):
            assert isinstance(expected, Left)
            assert record.seconds == pytest.approx(expected.seconds, rel=1e-12, abs=within_s or 1e-12)
            record = dataclasses.replace(record, seconds=expected.seconds)
        elif isinstance(record, Trained):
            assert isinstance(expected, Trained)
            assert record.seconds == pytest.approx(expected.seconds, rel=0, abs=within_s)
            record = dataclasses.replace(record, seconds=expected.seconds)
        assert record.time_s == pytest.approx(expected.time_s, rel=0, abs=within_s)
        assert dataclasses.replace(record, time_s=expected.time_s) == expected
    assert one.traffic is not None
    assert other.traffic is not None
    for of in ("up_bps", "down_bps", "up_bytes", "down_bytes", "to_sites"):
        assert getattr(one.traffic, of) == getattr(other.traffic, of)
    assert one.accounts is not None
    assert other.accounts is not None
    assert one.accounts.goodput == pytest.approx(other.accounts.goodput, rel=within_s or 1e-12)


def _of_workers(outcome: Outcome) -> list[Record]:
    """Return each worker's records in their order, one worker after the other."""
    return sorted(outcome.records, key=lambda each: each.worker)
