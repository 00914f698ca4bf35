"""Who is called slow, and why, from figures made up to know the answer."""

from __future__ import annotations

import random

import pytest

from decentral.workers.slowness import Measured, Slow, slow_workers


def steps(*seconds: float, loading: tuple[float, ...] = ()) -> dict[int, Measured]:
    each = loading or (0.0,) * len(seconds)
    return {worker: Measured(step_s, each[worker]) for worker, step_s in enumerate(seconds)}


def lines(matrix: list[list[float]], talk_share: float = 0.5) -> dict[int, Measured]:
    """Return workers of equal speed that send to each other with `matrix[source][target]` seconds per byte."""
    return {
        source: Measured(0.1, 0.0, talk_share, {target: value for target, value in enumerate(row) if value})
        for source, row in enumerate(matrix)
    }


def noisy(size: int, seed: int, times: dict[tuple[int | None, int | None], float]) -> list[list[float]]:
    """Return a matrix of ones with 3 % noise, some rows (source, None), columns (None, target) or cells longer."""
    draw = random.Random(seed)
    matrix = [[draw.gauss(1.0, 0.03) for _ in range(size)] for _ in range(size)]
    for source in range(size):
        matrix[source][source] = 0.0
        for target in range(size):
            for (row, column), factor in times.items():
                if row in (None, source) and column in (None, target):
                    matrix[source][target] *= factor
    return matrix


@pytest.mark.parametrize(
    ("measured", "found"),
    [
        (steps(1.0, 1.0, 1.0, 1.49), []),
        (steps(1.0, 1.0, 1.0, 2.0), [Slow(3, "compute", 2.0)]),
        (steps(1.0, 2.0), [Slow(1, "compute", 2.0)]),
        (steps(1.0, 1.0, 2.0, 2.0), [Slow(2, "compute", 2.0), Slow(3, "compute", 2.0)]),
        (steps(1.0, 2.0, 2.0, 2.0), []),  # one fast worker makes nobody slow
        (steps(1.0, 1.2, 0.8, 2.0), []),  # median 1, spread 0.2: eight of them, as standard deviations, are 2.4
        (steps(1.0, 1.2, 0.8, 3.4), [Slow(3, "compute", 3.4)]),
        (steps(1.0), []),
        ({}, []),
    ],
)
def test_a_step_is_slow_that_is_far_above_the_others(measured: dict[int, Measured], found: list[Slow]) -> None:
    assert slow_workers(measured) == found


@pytest.mark.parametrize(
    ("loading", "cause"),
    [((0.1, 0.1, 0.1, 0.5), "compute"), ((0.1, 0.1, 0.1, 0.7), "storage"), ((0.9,) * 4, "compute")],
)
def test_it_is_storage_if_half_of_what_a_step_takes_longer_is_loading(loading: tuple[float, ...], cause: str) -> None:
    assert [(slow.worker, slow.cause) for slow in slow_workers(steps(1.0, 1.0, 1.0, 2.0, loading=loading))] == [
        (3, cause)
    ]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("times", "found"),
    [
        ({}, []),
        ({(3, None): 3.0}, [3]),
        ({(None, 5): 3.0}, [5]),
        ({(3, None): 3.0, (None, 3): 3.0}, [3]),
        ({(1, 2): 3.0}, []),  # one pair is nobody's line
        ({(3, None): 3.0, (None, 5): 3.0}, [3, 5]),
    ],
)
def test_a_thin_line_is_found_in_the_matrix_of_all_pairs(
    times: dict[tuple[int | None, int | None], float], found: list[int], seed: int
) -> None:
    assert [slow.worker for slow in slow_workers(lines(noisy(8, seed, times)))] == found


def test_in_a_ring_a_line_that_is_thin_both_ways_is_found() -> None:
    ring = [[float(target == (source + 1) % 5) for target in range(5)] for source in range(5)]
    ring[2][3] = ring[1][2] = 4.0
    assert slow_workers(lines(ring)) == [Slow(2, "link", 4.0)]


def test_a_line_behind_which_nobody_waits_is_no_trouble() -> None:
    assert slow_workers(lines(noisy(8, 0, {(3, None): 3.0}), talk_share=0.05)) == []


def test_of_two_workers_nobody_can_say_whose_line_it_is() -> None:
    assert slow_workers(lines([[0.0, 1.0], [9.0, 0.0]])) == []


def test_who_computes_slowly_is_not_blamed_for_its_line_as_well() -> None:
    measured = lines(noisy(8, 0, {(3, None): 3.0}))
    measured[3] = Measured(0.4, 0.0, 0.5, measured[3].to)
    assert slow_workers(measured) == [Slow(3, "compute", pytest.approx(4.0))]
