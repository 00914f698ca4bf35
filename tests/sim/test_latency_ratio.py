"""NoLoCo's latency model through real messages: what has a closed form, and the smallest published cells."""

from __future__ import annotations

import math

import pytest

from benchmarks.latency_ratio import DEVIATIONS, PAIR_ROUNDS, PUBLISHED, as_published, ratio, times_s


@pytest.mark.parametrize("workers", [4, 16, 64])
def test_messages_of_one_length_go_up_and_down_a_tree_in_turn(workers: int) -> None:
    assert as_published(workers, 0.0)[0] == pytest.approx(math.log2(workers), rel=1e-9)


@pytest.mark.parametrize("deviation", [0.5, 1.0])
def test_a_pair_waits_for_the_slower_of_two_messages_twice(deviation: float) -> None:
    """E max(t1, t2) = (1 + erf(s / 2)) E t for log-normal times, where std / mean = sqrt(exp(s^2) - 1)."""
    sigma = math.sqrt(math.log1p(deviation**2))
    times = times_s("tree", 3, deviation, PAIR_ROUNDS / 4)
    mean, error = ratio(times, [1.0] * len(times))
    assert abs(mean - 2 * (1 + math.erf(sigma / 2))) < 4 * error + 1e-3
    assert error < 0.03 * mean


@pytest.mark.parametrize("deviation", [0.5, 1.0])
def test_four_workers_come_to_the_published_ratio(deviation: float) -> None:
    ours, error = as_published(4, deviation)
    assert ours == pytest.approx(PUBLISHED[4][DEVIATIONS.index(deviation)], rel=0.03)
    assert error < 0.03 * ours
