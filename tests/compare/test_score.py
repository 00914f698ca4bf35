"""AlgoPerf's profiles and scores against what they are in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from decentral.compare.score import TAUS, median_time, profile, score

FAR = math.inf
CELL = 0.5 / 99
"""What a step of a profile on the grid adds to the area: half of one of its 99 cells."""


def test_who_is_the_fastest_everywhere_has_all_of_the_area() -> None:
    times = {"lan": {"a": 3.0, "b": 7.0}, "wan": {"a": 0.5, "b": 0.6}}
    assert score(times, "a") == pytest.approx(1.0, abs=1e-12)
    assert list(profile(times, "a")) == [1.0] * 100


def test_twice_as_slow_everywhere_is_two_thirds() -> None:
    times = {"lan": {"a": 3.0, "b": 6.0}, "wan": {"a": 0.5, "b": 1.0}}
    assert score(times, "b") == pytest.approx((4 - 2) / 3 + CELL, abs=1e-12)


@pytest.mark.parametrize("failed", [FAR, math.nan, 4.1 * 2.0, None])
def test_half_of_the_workloads_is_a_half_whatever_became_of_the_others(failed: float | None) -> None:
    theirs = {} if failed is None else {"a": failed}
    assert score({"lan": {"a": 1.0, "b": 5.0}, "wan": {**theirs, "b": 2.0}}, "a") == pytest.approx(0.5, abs=1e-12)


def test_four_times_the_least_is_the_last_that_counts() -> None:
    shares = profile({"lan": {"a": 1.0, "b": 4.0, "c": 4.0000001}}, "b")
    assert (shares[-2], shares[-1]) == (0.0, 1.0)
    assert score({"lan": {"a": 1.0, "b": 4.0}}, "b") == pytest.approx(CELL, abs=1e-12)
    assert score({"lan": {"a": 1.0, "b": 4.0, "c": 4.0000001}}, "c") == 0.0


def test_nobody_there_is_nobody_first() -> None:
    assert score({"lan": {"a": FAR, "b": math.nan}}, "a") == 0.0


def test_a_target_reached_at_once_is_the_least_that_can_be() -> None:
    assert score({"lan": {"a": 0.0, "b": 1.0}}, "a") == pytest.approx(1.0)
    assert score({"lan": {"a": 0.0, "b": 1.0}}, "b") == 0.0


def test_a_dominated_submission_changes_nobodys_score() -> None:
    times = {"lan": {"a": 1.0, "b": 1.7}, "wan": {"a": 3.0, "b": 2.0}}
    more = {name: {**each, "worse": 1.5 * max(each.values())} for name, each in times.items()}
    for name in ("a", "b"):
        assert score(more, name) == score(times, name)


def test_a_better_submission_does_change_them() -> None:
    times = {"lan": {"a": 1.0}}
    assert score({"lan": {"a": 1.0, "better": 0.5}}, "a") < score(times, "a") == pytest.approx(1.0)


def test_a_workloads_unit_of_time_does_not_matter() -> None:
    times = {"lan": {"a": 1.0, "b": 1.7}, "wan": {"a": 3.0, "b": 2.0}}
    scaled = {"lan": {name: 3600 * time for name, time in times["lan"].items()}, "wan": times["wan"]}
    assert [score(scaled, name) for name in "ab"] == [score(times, name) for name in "ab"]


def test_the_area_is_that_of_the_profile() -> None:
    """Ratios 1, 1.5 and 3.2 of three workloads: the integral of the steps, to a cell of the grid each."""
    times = {"x": {"a": 1.0, "b": 9.0}, "y": {"a": 1.5, "b": 1.0}, "z": {"a": 3.2, "b": 1.0}}
    exact = np.mean([4 - 1, 4 - 1.5, 4 - 3.2]) / 3
    assert score(times, "a") == pytest.approx(exact, abs=2 * CELL)
    assert TAUS[0] == 1.0
    assert TAUS[-1] == 4.0
    assert len(TAUS) == 100


@pytest.mark.parametrize(
    ("times", "median"),
    [
        ([3.0, FAR, 2.0], 3.0),
        ([FAR, 1.0, FAR], FAR),
        ([FAR, 1.0, math.nan], FAR),
        ([math.nan, 1.0, 2.0], 2.0),
        ([4.0, 1.0], 2.5),
        ([4.0, FAR], FAR),
        ([4.0, FAR, 1.0, 2.0], 3.0),
        ([5.0], 5.0),
    ],
)
def test_a_median_counts_who_did_not_get_there(times: list[float], median: float) -> None:
    assert median_time(times) == median


def test_nothing_has_no_median_and_no_profile() -> None:
    with pytest.raises(ValueError, match="no times"):
        median_time([])
    with pytest.raises(ValueError, match="at least one workload"):
        score({}, "a")
