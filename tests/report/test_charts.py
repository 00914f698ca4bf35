"""Axes, fronts and numbers for people."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from decentral.report.page.charts import front
from decentral.report.page.words import duration_text, log_ticks, ranges_text, ticks


@pytest.mark.parametrize("higher_is_better", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_front_has_exactly_those_whom_nobody_beats(seed: int, higher_is_better: bool) -> None:
    draw = random.Random(seed)
    points = [(float(draw.randint(1, 12)), draw.random()) for _ in range(30)]

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        as_good = one[1] >= other[1] if higher_is_better else one[1] <= other[1]
        return one != other and one[0] <= other[0] and as_good

    expected = {place for place, point in enumerate(points) if not any(beats(other, point) for other in points)}
    found = front(points, higher_is_better)
    assert set(found) == expected
    assert [points[place][0] for place in found] == sorted(points[place][0] for place in expected)


@pytest.mark.parametrize("seed", range(20))
def test_ticks_are_few_even_and_inside(seed: int) -> None:
    draw = random.Random(seed)
    low = draw.uniform(-5, 5)
    high = low + 10 ** draw.uniform(-3, 6)
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert low - 1e-6 * (high - low) <= found[0]
    assert found[-1] <= high + 1e-6 * (high - low)
    steps = [after - before for before, after in pairwise(found)]
    assert steps == pytest.approx([steps[0]] * len(steps))


@pytest.mark.parametrize(("low", "high"), [(1.0, 30.0), (3e5, 8e9), (2e-3, 5e-2)])
def test_ticks_of_ratios_are_inside(low: float, high: float) -> None:
    found = log_ticks(low, high)
    assert len(found) >= 2
    assert all(0.99 * low <= each <= 1.01 * high for each in found)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.25, "250 ms"),
        (41.04, "41.0 s"),
        (99.99, "1 min 40 s"),
        (3599.7, "1 h 0 min"),
        (5637.3, "1 h 34 min"),
        (200_000.0, "2 d 8 h"),
    ],
)
def test_times_have_two_units(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(("numbers", "text"), [([], "nobody"), ([3], "3"), ([0, 1, 2, 5, 7, 6], "0-2, 5-7")])
def test_runs_of_numbers_are_drawn_together(numbers: list[int], text: str) -> None:
    assert ranges_text(numbers) == text
