"""What the hour of churn is judged by, on samples and records whose answers are known."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from decentral.journal import Joined, Left, Record, Settled
from soak.churn import BEGIN_S, MINUTE_S, WARM_S, goodput, growth, more
from soak.processes import Sample, descendants, sample

MB = 1e6


def life(pid: int, begin_s: float, resident: float, rate: float, files: int = 10, more_files: int = 0) -> list[Sample]:
    """A process that fills its memory until it is warm, then grows by `rate` bytes a second for 100 samples."""
    cold = [Sample(begin_s, pid, "Worker", 0, 5, files)]
    return cold + [
        Sample(
            begin_s + WARM_S + 10 * i, pid, "Worker", round(resident + rate * 10 * i), 5, files + more_files * i // 100
        )
        for i in range(1, 101)
    ]


def test_growth_is_that_of_single_processes_whatever_each_began_with() -> None:
    assert growth([*life(1, 0.0, 100 * MB, 1000.0), *life(2, 500.0, 300 * MB, 1000.0)]) == pytest.approx(1000.0)
    assert growth([*life(1, 0.0, 300 * MB, 0.0), *life(2, 500.0, 100 * MB, 0.0)]) == 0.0


def test_what_leaks_files_is_found_among_those_that_do_not() -> None:
    assert more([*life(1, 0.0, MB, 0.0), *life(2, 0.0, MB, 0.0, more_files=100)], "files") == pytest.approx(75, abs=2)
    assert more(life(1, 0.0, MB, 0.0, files=50), "files") == 0


def stay(worker: int, begin_s: float, end_s: float) -> list[Record]:
    accounts = {"seconds": {}, "sent_bytes": 0, "received_bytes": 0, "messages_sent": 0}
    left = Left(time_s=end_s, worker=worker, reason="crashed", step=1, **accounts)
    return [Joined(time_s=begin_s, worker=worker, parameters=1), left]


def test_goodput_is_by_the_pace_of_quiet_minutes_and_by_who_was_there() -> None:
    """Worker 0 settles a sample a second and worker 1 half of one in minutes that are not quiet; it is away in one."""
    end_s = BEGIN_S + 11 * MINUTE_S
    records = [*stay(0, 0.0, end_s), *stay(1, 0.0, BEGIN_S + MINUTE_S), *stay(1, BEGIN_S + 2 * MINUTE_S, end_s)]
    for second in range(int(end_s)):
        minute = (second - BEGIN_S) // MINUTE_S + 1
        records.append(Settled(time_s=second + 0.5, worker=0, samples=2))
        if minute != 2:
            records.append(Settled(time_s=second + 0.5, worker=1, samples=2 if minute % 5 == 0 else 1))
    churned = (8 * MINUTE_S * 2 + 7 * MINUTE_S * 1) / (15 * MINUTE_S)
    assert goodput(records, 11) == pytest.approx(churned / 2)


def test_all_that_we_have_started_is_found_with_what_it_takes() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    before = set(descendants())
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as child:
        while len(found := set(descendants()) - before) < 2:
            time.sleep(0.01)
        assert child.pid in found
        assert os.getpid() not in found
        seen = sample(child.pid, 1.5)
        assert seen is not None
        assert (seen.at_s, seen.pid, seen.threads) == (1.5, child.pid, 1)
        assert seen.resident > MB
        assert seen.files >= 3
        child.communicate(b"\n" * 2)
    assert set(descendants()) <= before
    assert sample(child.pid, 0.0) is None
