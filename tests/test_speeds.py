"""What is known of workers' speeds: a running mean of our own, and what others say if it can be a number of seconds."""

from __future__ import annotations

import pytest

from decentral.speeds import NEWEST_SHARE, Speeds
from decentral.wire import FrameError, Packet, signal


def warm() -> Speeds:
    speeds = Speeds()
    speeds.measured(1, 100.0)
    return speeds


def test_the_first_measurement_is_of_warming_up_and_the_second_is_taken_as_it_is() -> None:
    speeds = Speeds()
    for _ in range(2):
        assert speeds.own is None
        speeds.measured(5, 1.0)
    assert speeds.own == 0.2
    assert speeds.rough
    speeds.measured(5, 1.0)
    assert not speeds.rough


def test_a_phase_counts_as_much_as_its_steps_one_by_one() -> None:
    """m <- m + a (x - m), done k times with the same x, is m <- x + (1 - a)^k (m - x)."""
    at_once, one_by_one = warm(), warm()
    for speeds in (at_once, one_by_one):
        speeds.measured(1, 3.0)
    at_once.measured(7, 7 * 1.0)
    for _ in range(7):
        one_by_one.measured(1, 1.0)
    assert at_once.own == pytest.approx(one_by_one.own) == pytest.approx(1 + (1 - NEWEST_SHARE) ** 7 * 2)


def test_a_worker_is_known_by_what_it_told_last() -> None:
    teller, listener = warm(), Speeds()
    teller.measured(3, 0.3)
    listener.told(4, teller.packet())
    teller.measured(1000, 50.0)
    listener.told(4, teller.packet())
    assert listener.of([2, 4, 6]) == [pytest.approx(0.05)]
    assert listener.of([2]) == []


@pytest.mark.parametrize("packet", [*map(signal, ["", "fast", "nan", "inf", "-1", "0"]), Packet("float32", 1, 4, None)])
def test_what_is_no_number_of_seconds_is_refused(packet: Packet) -> None:
    speeds = Speeds()
    with pytest.raises(FrameError):
        speeds.told(1, packet)
    assert speeds.of([1]) == []
