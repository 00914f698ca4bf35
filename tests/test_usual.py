"""What is usual, and what is not, by closed forms."""

from __future__ import annotations

from statistics import NormalDist

import pytest

from decentral.usual import MAD_TO_SIGMA, SPREADS, usual_most


def quantiles(law: NormalDist, count: int) -> list[float]:
    """Return `count` durations that are distributed as the law says, without chance."""
    return [law.inv_cdf((index + 0.5) / count) for index in range(count)]


def test_the_usual_most_of_normal_durations_is_so_many_standard_deviations_above_the_mean() -> None:
    law = NormalDist(10.0, 0.5)
    assert usual_most(quantiles(law, 999)) == pytest.approx(law.mean + SPREADS * law.stdev, rel=1e-3)
    assert pytest.approx(1 / NormalDist().inv_cdf(0.75), rel=1e-5) == MAD_TO_SIGMA


def test_outliers_among_less_than_half_do_not_move_it_far() -> None:
    usual = [9.0, 10.0, 11.0] * 11
    assert usual_most(usual) == pytest.approx(10 + SPREADS * MAD_TO_SIGMA * 1)
    assert usual_most([*usual, *[1e9] * 10]) <= 11 + SPREADS * MAD_TO_SIGMA * 2
