"""Who is suspected, and when: closed forms, invariances, and machines that sleep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import NormalDist

import pytest

from decentral.usual import MAD_TO_SIGMA, SPREADS
from decentral.workers.detector import Detector


def beats(intervals: Iterable[float]) -> Iterator[float]:
    now = 0.0
    for interval in intervals:
        now += interval
        yield now


def fed(intervals: Iterable[float], interval_s: float = 1.0) -> tuple[Detector, float]:
    """Return a detector that watches worker 1 since 0 and looks often, and when it heard of it last."""
    detector = Detector(interval_s)
    detector.watch([1], 0.0)
    now = 0.0
    for beat in beats(intervals):
        look_until(detector, now, beat)
        detector.heard(1, now := beat)
    return detector, now


def look_until(detector: Detector, since: float, until: float, every: float = 0.5) -> None:
    """Ask who is suspected every half second, as the one who runs a detector does."""
    for index in range(1, int((until - since) / every) + 1):
        detector.suspected(since + index * every)


def patience(intervals: Iterable[float], interval_s: float = 1.0) -> float:
    detector, now = fed(intervals, interval_s)
    return detector.deadline(1) - now


REGULAR = [1.0] * 100


def test_two_beats_of_a_regular_peer_may_be_lost() -> None:
    assert patience(REGULAR) == pytest.approx(3.0)


def test_normal_jitter_makes_the_deadline_that_the_formula_says() -> None:
    law = NormalDist(3.0, 0.4)
    intervals = [law.inv_cdf((index + 0.5) / 199) for index in range(199)]
    assert patience(intervals, interval_s=2.0) == pytest.approx(max(9.0, 3 + SPREADS * 0.4), rel=0.02)
    law = NormalDist(3.0, 0.9)
    intervals = [law.inv_cdf((index + 0.5) / 199) for index in range(199)]
    assert patience(intervals, interval_s=1.0) == pytest.approx(3 + SPREADS * 0.9, rel=0.02)


def test_a_known_spread_gives_a_known_deadline() -> None:
    assert patience([0.7, 1.0, 1.3] * 30) == pytest.approx(1 + SPREADS * MAD_TO_SIGMA * 0.3)


def test_one_outage_is_forgotten_and_two_pauses_are_a_habit() -> None:
    assert patience([*REGULAR, 60.0, *REGULAR]) == pytest.approx(3.0)
    assert patience([*REGULAR, 60.0, *REGULAR, 2.6, *REGULAR]) == pytest.approx(1.5 * 2.6)


def test_a_habit_of_long_ago_is_forgotten() -> None:
    intervals = [*REGULAR, 9.0, 9.0, *REGULAR]
    assert patience(intervals) == pytest.approx(13.5)
    assert patience([*intervals, *[1.0] * Detector.KEPT]) == pytest.approx(3.0)


def test_a_peer_is_given_time_until_it_is_known() -> None:
    assert patience([]) == pytest.approx(9.0)
    assert patience([1.0] * (Detector.ENOUGH - 1)) == pytest.approx(9.0)
    assert patience([1.0] * Detector.ENOUGH) == pytest.approx(3.0)


@pytest.mark.parametrize("factor", [0.01, 0.1, 10.0])
def test_all_times_ten_fold_make_deadlines_ten_fold(factor: float) -> None:
    intervals = [0.8, 1.0, 1.3, 2.2, 0.9] * 20
    detector = Detector(factor)
    detector.watch([1], 0.0)
    for beat in beats(intervals):
        detector.suspected(factor * (beat - 0.4))
        detector.heard(1, factor * beat)
    left = detector.deadline(1) - factor * sum(intervals)
    assert left == pytest.approx(factor * patience(intervals))


def test_suspicion_only_grows_with_silence_and_a_beat_ends_it() -> None:
    detector = Detector(1.0)
    detector.watch([1, 2, 3], 0.0)
    for beat in range(1, 101):
        detector.heard(1, beat)
        detector.heard(2, beat)
        if beat <= 98:
            detector.heard(3, beat)
    seen: list[list[int]] = []
    for step in range(1, 13):
        detector.heard(2, 100 + step / 2)
        seen.append(detector.suspected(100 + step / 2))
    assert seen == [[]] * 2 + [[3]] * 4 + [[1, 3]] * 6
    detector.heard(1, 106.5)
    assert detector.suspected(106.5) == [3]
    assert detector.deadline(1) > 106.5


def test_whatever_comes_is_a_sign_of_life_but_no_interval() -> None:
    """A stream of packets between the beats keeps a peer alive, and does not make the detector impatient."""
    detector, now = fed(REGULAR)
    for packet in range(5000):
        detector.heard(1, now + packet / 1000)
    assert detector.deadline(1) - (now + 4.999) == pytest.approx(3.0)


def test_beats_that_come_late_in_a_heap_teach_no_haste() -> None:
    detector, now = fed(REGULAR)
    for _ in range(400):
        detector.heard(1, now)
    assert detector.deadline(1) - now == pytest.approx(3.0)


# Our own sleep


@pytest.mark.parametrize("asleep_s", [2.0, 20.0, 3600.0])
def test_on_waking_nobody_is_suspected_for_our_own_sleep(asleep_s: float) -> None:
    detector = Detector(1.0)
    detector.watch([1, 2], 0.0)
    for beat in range(1, 101):
        detector.heard(1, beat - 0.5)
        detector.heard(2, beat)
    woken = 100 + asleep_s
    assert detector.suspected(woken) == []  # asked before anything that has come meanwhile is read
    detector.heard(1, woken)
    look_until(detector, woken, woken + 1.5)
    assert detector.suspected(woken + 1.5) == []


def test_who_died_while_we_slept_is_found_soon_after() -> None:
    detector, now = fed(REGULAR)
    woken = now + 20
    detector.suspected(woken)
    look_until(detector, woken, woken + 2)
    assert detector.suspected(woken + 2) == []
    assert detector.suspected(woken + 2.1) == [1]  # one interval of the sleep counts, and two since


def test_a_sleep_is_no_interval_of_anybody() -> None:
    detector, now = fed(REGULAR)
    for _ in range(3):
        detector.heard(1, now := now + 50)
        assert detector.deadline(1) - now == pytest.approx(3.0)
        for _ in range(5):
            detector.suspected(now + 0.5)
            detector.heard(1, now := now + 1.0)


def test_one_who_looks_too_seldom_is_late_but_not_blind() -> None:
    detector, now = fed(REGULAR)
    looks = [now + 10 * index for index in range(1, 6)]
    assert [detector.suspected(look) for look in looks] == [[], [], [], [1], [1]]


# Who is watched


def test_a_new_peer_is_watched_from_now_and_one_that_left_is_forgotten() -> None:
    detector, now = fed(REGULAR)
    detector.watch([1, 2], now)
    assert detector.deadline(1) - now == pytest.approx(3.0)
    assert detector.deadline(2) - now == pytest.approx(9.0)
    detector.watch([2], now)
    detector.heard(1, now + 0.5)  # a late word of one that has left
    with pytest.raises(KeyError):
        detector.deadline(1)
    look_until(detector, now + 0.5, now + 10)
    assert detector.suspected(now + 10) == [2]
