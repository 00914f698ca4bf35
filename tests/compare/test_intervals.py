"""Intervals over seeds against tables and against what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from decentral.compare.intervals import Estimate, estimate, paired, t_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # of any table of Student's distribution, two-sided 95 %
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (100, 1.984), (10_000, 1.960)],
)
def test_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=6e-4)


def test_an_interval_by_hand() -> None:
    """1, 2 and 3: standard deviation 1, and t of two degrees of freedom."""
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.margin == pytest.approx(4.30265 / np.sqrt(3), rel=1e-5)


def test_one_seed_has_no_interval() -> None:
    assert estimate([2.5]) == Estimate(2.5, None)
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_what_seeds_have_in_common_falls_out_of_differences() -> None:
    base = [1.0, 5.0, 9.0, 2.0]
    found = paired([value + 0.25 for value in base], base)
    assert (found.mean, found.margin) == (0.25, 0.0)
    with pytest.raises(ValueError, match="zip"):
        paired([1.0], base)


def test_intervals_of_five_seeds_cover_the_truth_as_often_as_they_say() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(1000, 5))
    found = [estimate(row.tolist()) for row in draws]
    covered = sum(abs(each.mean - 3.0) <= (each.margin or 0.0) for each in found)
    assert covered == pytest.approx(950, abs=4 * np.sqrt(1000 * 0.95 * 0.05))
