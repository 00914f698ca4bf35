"""Wall clocks that are shifted for single processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chaos.clocks import Clocks, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
HOUR_S = 3600
CLOSE_S = 5.0
LOOK = """
import datetime, json, multiprocessing, sys, time
semaphore = multiprocessing.Semaphore(0)
for _ in sys.stdin:
    began = time.perf_counter()
    semaphore.acquire(timeout=0.1)  # until a time of the wall clock
    times = [time.time(), datetime.datetime.now().timestamp(), time.monotonic(), time.perf_counter() - began]
    print(json.dumps(times), flush=True)
"""


def test_a_wall_clock_jumps_for_the_processes_of_its_node_alone(tmp_path: Path) -> None:
    clocks = Clocks(tmp_path, 2)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen([sys.executable, "-c", LOOK], env={**os.environ, **clocks.environment[1]}, **pipes) as one,
        subprocess.Popen([sys.executable, "-c", LOOK], env={**os.environ, **clocks.environment[2]}, **pipes) as two,
    ):
        for skew_s in (0, HOUR_S, -HOUR_S):
            clocks.skew(1, skew_s)
            for process, expected_s in ((one, skew_s), (two, 0)):
                assert process.stdin is not None
                assert process.stdout is not None
                print(file=process.stdin, flush=True)
                wall, today, monotonic, waited_s = json.loads(process.stdout.readline())
                assert wall == pytest.approx(time.time() + expected_s, abs=CLOSE_S)
                assert today == pytest.approx(wall, abs=CLOSE_S)
                assert monotonic == pytest.approx(time.monotonic(), abs=CLOSE_S)
                assert 0.1 <= waited_s < CLOSE_S
