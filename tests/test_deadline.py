"""Deadlines that are learned from durations."""

from __future__ import annotations

from statistics import NormalDist

import pytest

from decentral.deadline import MAD_TO_SIGMA, SPREADS, AdaptiveDeadline, usual_most


def fed(durations: list[float], most_s: float = 1e6, floor_s: float = 1e-6) -> AdaptiveDeadline:
    deadline = AdaptiveDeadline(most_s, floor_s)
    for seconds in durations:
        deadline.observe(seconds)
    return deadline


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


def test_the_first_rounds_have_all_the_time_there_is() -> None:
    for known in range(AdaptiveDeadline.ENOUGH):
        assert fed([1.0] * known, most_s=60).deadline() == 60
    assert fed([1.0] * AdaptiveDeadline.ENOUGH, most_s=60).deadline() < 60


def test_rounds_that_take_exactly_as_long_leave_half_of_it_again() -> None:
    assert fed([2.0] * 20).deadline() == pytest.approx(3.0)


def test_a_known_spread_gives_a_known_deadline() -> None:
    assert fed([9.0, 10.0, 11.0] * 10).deadline() == pytest.approx(10 + SPREADS * MAD_TO_SIGMA * 1)


def test_deadlines_stay_between_floor_and_most() -> None:
    assert fed([1e-3] * 20, floor_s=0.5).deadline() == 0.5
    assert fed([100.0] * 20, most_s=60).deadline() == 60
    for floor_s in (0.0, -1.0, 61.0):
        with pytest.raises(ValueError, match=f"floor_s must be above 0 and at most most_s = 60; got {floor_s:g}"):
            AdaptiveDeadline(60, floor_s)


@pytest.mark.parametrize("durations", [[1.0] * 30, [1.0, 5.0] * 15, [0.1] * 14 + [7.0] * 16, list(range(1, 31))])
def test_a_deadline_is_never_below_what_is_usual(durations: list[float]) -> None:
    """Whoever is the slowest, and makes the rounds take as long as they do, is waited for."""
    assert fed(durations).deadline() >= sorted(durations)[len(durations) // 2]


def test_all_times_ten_fold_make_deadlines_ten_fold() -> None:
    durations = quantiles(NormalDist(3.0, 0.7), 40)
    deadline = fed(durations, most_s=100, floor_s=0.01)
    slower = fed([10 * seconds for seconds in durations], most_s=1000, floor_s=0.1)
    assert slower.deadline() == pytest.approx(10 * deadline.deadline())


def test_every_miss_doubles_the_deadline_up_to_the_most() -> None:
    deadline = fed([1.0] * 10, most_s=10)
    seen = []
    for _ in range(5):
        seen.append(deadline.deadline())
        deadline.missed()
    assert seen == pytest.approx([1.5, 3.0, 6.0, 10.0, 10.0])
    for _ in range(3):
        deadline.observe(1.0)
    assert deadline.deadline() == pytest.approx(1.5)


@pytest.mark.parametrize("slower", [2.0, 5.0, 30.0])
def test_who_becomes_slower_is_missed_a_few_times_and_then_waited_for(slower: float) -> None:
    deadline = fed([1.0] * AdaptiveDeadline.SEEN, most_s=60)
    missed = []
    for round_ in range(200):
        if slower <= deadline.deadline():
            deadline.observe(slower)
        else:
            deadline.missed()
            missed.append(round_)
    doublings = next(count for count in range(10) if 1.5 * 2**count >= slower)
    assert missed == list(range(doublings))
    assert deadline.deadline() == pytest.approx(1.5 * slower)
