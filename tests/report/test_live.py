"""The live view says how far a run is, on both clocks when there are two."""

from __future__ import annotations

import io
import re

import pytest
from cluster import cluster
from rich.console import Console

from decentral.journal import Joined, Left, Record, Trained
from decentral.protocols import DiLoCo
from decentral.report.live import LiveView


def trained(worker: int, step: int, time_s: float) -> Trained:
    return Trained(time_s=time_s, worker=worker, step=step, steps=step, samples=step, seconds=0.0, loss=None)


def crashed(worker: int, step: int, time_s: float) -> Left:
    return Left(
        time_s=time_s,
        worker=worker,
        reason="crashed",
        step=step,
        seconds={},
        sent_bytes=0,
        received_bytes=0,
        messages_sent=0,
    )


def shown(records: list[Record], *, virtual: bool) -> str:
    """Return what stands below the live table after these records, of a run of 2 workers and 100 steps."""
    console = Console(file=io.StringIO())
    with LiveView(cluster(DiLoCo(period=10), 2, 100), console, "loss", virtual=virtual) as live:
        for record in records:
            live.see(record)
        return str(live._table().caption)


JOINED: list[Record] = [Joined(time_s=0.0, worker=worker, parameters=1) for worker in (0, 1)]


@pytest.mark.parametrize(
    ("records", "left"),
    [
        ([trained(0, 30, 3700.0), trained(1, 20, 3700.0)], "3:05:00"),  # 150 of 200 steps are left: three times as long
        ([trained(0, 50, 60.0), crashed(1, 10, 60.0)], "1:00"),  # who is gone does no more steps
        ([trained(0, 100, 60.0), trained(1, 100, 60.0)], "0:00"),
    ],
)
def test_what_is_left_is_estimated_in_virtual_time(records: list[Record], left: str) -> None:
    text = shown([*JOINED, *records], virtual=True)
    assert re.search(rf"simulated in 0:0\d, .* times as fast as real time; about {left} left, in 0:0\d$", text)


def test_before_the_first_step_nothing_is_estimated() -> None:
    assert shown([], virtual=True) == ""
    assert "left" not in shown(JOINED, virtual=True)


def test_a_real_run_has_one_clock() -> None:
    assert shown([*JOINED, trained(0, 50, 60.0)], virtual=False) == ""
