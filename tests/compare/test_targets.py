"""What counts as reached, and what that took."""

from __future__ import annotations

import math

import pytest

from decentral.compare.targets import default_target, used_up_to
from decentral.report.curves import MEASURES, Curve, Point


def at(step: int, value: float, dollars: float | None = 1.0) -> Point:
    return Point(steps=step, samples=8.0 * step, bytes=0.0, seconds=step / 2, dollars=dollars, value=value)


CURVE = Curve((at(0, 8.0), at(10, 3.0), at(20, 2.0), at(30, 2.5)), {}, at(40, 1.5))


@pytest.mark.parametrize(("target", "steps"), [(9.0, 0), (3.0, 10), (2.9, 20), (1.9, 40), (1.5, 40), (1.4, math.inf)])
def test_the_first_evaluation_that_is_good_enough_counts(target: float, steps: float) -> None:
    used = used_up_to(CURVE, target, higher_is_better=False)
    assert used["steps"] == steps
    assert used["samples"] == 8 * steps
    assert used["seconds"] == steps / 2


def test_more_may_be_better() -> None:
    curve = Curve((at(0, 0.1), at(10, 0.5)), {}, at(20, math.nan))
    assert used_up_to(curve, 0.5, higher_is_better=True)["steps"] == 10
    assert used_up_to(curve, 0.6, higher_is_better=True)["steps"] == math.inf  # NaN is as good as nothing


def test_who_diverged_never_gets_there_and_unknown_prices_stay_unknown() -> None:
    assert used_up_to(None, 1.0, higher_is_better=False) == dict.fromkeys(MEASURES, math.inf)
    unpriced = Curve((), {}, at(5, 3.0, None))
    assert [used_up_to(unpriced, target, False)["dollars"] for target in (4.0, 2.0)] == [None, None]


@pytest.mark.parametrize(
    ("finals", "higher_is_better", "target"),
    [
        ([2.0], False, 2.0),
        ([3.0, 1.0, 2.0], False, 2.0),
        ([3.0, 1.0], False, 3.0),
        ([3.0, 1.0], True, 1.0),
        ([4.0, 3.0, 1.0, 2.0], False, 3.0),
        ([math.nan, 1.0, 2.0], False, 2.0),
        ([math.nan, 0.9, 0.5], True, 0.5),
    ],
)
def test_half_of_the_baselines_runs_reach_its_median(
    finals: list[float], higher_is_better: bool, target: float
) -> None:
    assert default_target(finals, higher_is_better) == target
    reached = sum(final >= target if higher_is_better else final <= target for final in finals)
    assert 2 * reached >= len(finals)
