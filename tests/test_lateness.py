"""Who comes late, and how long it is waited for."""

from __future__ import annotations

import math

import pytest

from decentral.lateness import Lateness

PATIENCE_S = 10.0


def late_by(*seconds: float) -> Lateness:
    """Return what is known of worker 3 on channel "sync" after rounds that it came to so late."""
    lateness = Lateness(PATIENCE_S)
    for round_, late_s in enumerate(seconds, 1):
        began = 1000.0 * round_
        if late_s > lateness.allowed_s(3, "sync"):
            lateness.missed(3, "sync", round_, began)
        lateness.came(3, "sync", round_, began + late_s)
    return lateness


def test_while_nobody_is_late_everybody_has_the_patience() -> None:
    assert late_by().allowed_s(3, "sync") == PATIENCE_S
    assert late_by(*[0.1] * 50, 9.9).allowed_s(3, "sync") == PATIENCE_S


@pytest.mark.parametrize(("late_s", "allowed_s"), [(10.5, 15.75), (20.0, 30.0), (80.0, 100.0), (1e6, 100.0)])
def test_who_came_late_may_be_half_as_late_again_up_to_ten_patiences(late_s: float, allowed_s: float) -> None:
    lateness = late_by(late_s)
    assert lateness.allowed_s(3, "sync") == pytest.approx(allowed_s)
    assert lateness.allowed_s(2, "sync") == lateness.allowed_s(3, "other") == PATIENCE_S


def test_the_first_round_that_was_missed_tells_how_late_and_then_the_next_one() -> None:
    lateness = Lateness(PATIENCE_S)
    lateness.missed(3, "sync", 1, 100.0)
    lateness.missed(3, "sync", 2, 120.0)
    lateness.came(3, "sync", 1, 130.0)
    assert lateness.allowed_s(3, "sync") == pytest.approx(1.5 * 30.0)
    lateness.came(3, "sync", 2, 160.0)  # nobody was to tell of round 2
    assert lateness.allowed_s(3, "sync") == pytest.approx(1.5 * 30.0)
    lateness.missed(3, "sync", 3, 170.0)
    lateness.came(3, "sync", 2, 180.0)
    lateness.came(3, "sync", 3, 190.0)
    assert lateness.allowed_s(3, "sync") == pytest.approx(1.5 * 20.0)


def test_a_round_that_somebody_has_passed_over_tells_nothing() -> None:
    lateness = Lateness(PATIENCE_S)
    lateness.missed(3, "sync", 1, 100.0)
    lateness.came(3, "sync", 2, 500.0)
    lateness.came(3, "sync", 1, 501.0)
    assert lateness.allowed_s(3, "sync") == PATIENCE_S


def test_who_is_missed_twice_in_silence_has_no_more_than_the_patience() -> None:
    lateness = late_by(20.0)
    lateness.missed(3, "sync", 2, 2000.0)
    lateness.missed(3, "sync", 2, 2001.0)  # another piece of that round
    assert lateness.allowed_s(3, "sync") == pytest.approx(30.0)
    lateness.missed(3, "sync", 3, 2100.0)
    assert lateness.allowed_s(3, "sync") == PATIENCE_S


def test_who_is_missed_twice_and_heard_in_between_is_only_further_behind() -> None:
    lateness = late_by(20.0)
    lateness.missed(3, "sync", 3, 3000.0)
    lateness.came(3, "sync", 2, 3010.0)
    lateness.missed(3, "sync", 4, 3100.0)
    assert lateness.allowed_s(3, "sync") == pytest.approx(30.0)


@pytest.mark.parametrize("slower_s", [10.3, 14.9, 31.7, 58.3, 87.1])
@pytest.mark.parametrize("phase_s", [0.1, 10.0, 1000.0])
def test_a_slow_worker_is_waited_for_in_the_end_and_ever_after(slower_s: float, phase_s: float) -> None:
    """Its phases take `phase_s` + `slower_s`, and ours `phase_s`.

    Before its first part comes we begin to wait for it `unknown` times, and give up after the patience each time. That
    makes it lag behind, and the lag shrinks by what it is allowed beyond `slower_s`.
    """
    in_time = meetings(phase_s, slower_s, rounds=200)
    unknown = 1 + int(slower_s // (phase_s + PATIENCE_S))
    lag_s = slower_s + unknown * (slower_s - PATIENCE_S)
    allowed_s = min(1.5 * slower_s, 10 * PATIENCE_S)
    shrinking = math.ceil(max(0.0, lag_s - allowed_s) / (allowed_s - slower_s))
    first = in_time.index(True)
    assert unknown <= first <= unknown + shrinking
    assert all(in_time[first:])


def meetings(phase_s: float, slower_s: float, rounds: int) -> list[bool]:
    """Return for each round of two workers whether the slow one came to it in time."""
    lateness, our_phase_s, its_phase_s = Lateness(PATIENCE_S), phase_s, phase_s + slower_s
    we_begin = it_begins = 0.0
    coming: list[tuple[float, int]] = []
    in_time = []

    def come(until: float) -> None:
        while coming and coming[0][0] <= until:
            arrives, round_ = coming.pop(0)
            lateness.came(3, "sync", round_, arrives)

    for round_ in range(1, rounds + 1):
        since, arrives = we_begin + our_phase_s, it_begins + its_phase_s
        coming.append((arrives, round_))
        come(since)
        we_give_up = since + lateness.allowed_s(3, "sync")
        come(we_give_up)
        in_time.append(arrives <= we_give_up)
        if not in_time[-1]:
            lateness.missed(3, "sync", round_, since)
        it_begins, we_begin = arrives, min(arrives, we_give_up)
    return in_time
