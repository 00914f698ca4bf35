"""The coordinator in a process of its own, started as people and job schedulers start it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from loops import loop, optimizer_of
from processes import LONG_S, SECRET, WHOLE_LINES, Crew, flat, free_address
from test_join import STEPS, run_of

import decentral
from decentral.config import Run
from decentral.errors import ConfigError
from decentral.journal import Left, Synced, read_journal
from decentral.protocols import DiLoCo
from decentral.replica import initial_model

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "deploy" / "slurm" / "own_loop.sbatch"


def joined(place: dict[str, Any], tell: Any, run: Run) -> list[float]:
    """Train as the run says; return the parameters. Worker 0 stays in the midst of its second phase."""
    model = initial_model(run.make_task(), run.seed)
    optimizer = optimizer_of(run, model)
    with decentral.join(run, **place) as fleet:
        sync = fleet.attach(model, optimizer)

        def step() -> bool:
            if fleet.worker == 0 and sync.steps == 4:
                tell("here I stay")
                signal.pause()
            return sync.step()

        loop(run, fleet.worker, model, optimizer, step, run.steps)
    return flat(model)


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Have the process ended, however this goes."""
    try:
        yield
    finally:
        process.kill()


def test_the_run_outlives_worker_0(tmp_path: Path) -> None:
    address = free_address()
    command = [sys.executable, "-m", "decentral.cli", "coordinate", "--address", address, "--workers", "3"]
    command += ["--out", str(tmp_path)]
    environment = {**os.environ, "DECENTRAL_SECRET": SECRET}
    with (
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as coordinator,
        ended(coordinator),
        Crew(joined, 3, run_of(DiLoCo(period=3), 3)) as crew,
    ):
        assert coordinator.stderr is not None
        assert coordinator.stderr.readline() == f"serving at {address}; the workers may come\n"
        crew.start(0, 1, 2, address=address, apart=True)
        for worker, _ in crew.heard():
            assert worker == 0
            killed = crew.processes.pop(0)
            killed.kill()
            killed.join()
        first, second = crew.answers()
        assert coordinator.wait(LONG_S) == 0
    assert first == second
    journal = list(read_journal(tmp_path / "journal.jsonl"))
    finished = [record for record in journal if isinstance(record, Left) and record.reason == "finished"]
    assert sorted((record.worker, record.step) for record in finished) == [(1, STEPS), (2, STEPS)]
    parties = [record.members for record in journal if isinstance(record, Synced) and record.worker == 1]
    assert (parties[0], parties[-1]) == ((0, 1, 2), (1, 2))


def test_the_journal_is_the_coordinators(tmp_path: Path) -> None:
    model = initial_model(run_of(DiLoCo(), 1).make_task(), 0)
    place = {"worker": 0, "workers": 1, "address": free_address(), "secret": SECRET}
    fleet = decentral.join(apart=True, out=tmp_path, **place)
    with pytest.raises(ConfigError, match=r"out: the coordinator is apart, .* `decentral coordinate` --out"), fleet:
        fleet.attach(model, optimizer_of(run_of(DiLoCo(), 1), model))


# What srun does, without Slurm: so many processes at once, each with its number.
SRUN = """#!/bin/bash
[ "$1 $2" = "--ntasks-per-node=1 --kill-on-bad-exit=0" ] || exit 64
for ((task = 0; task < SLURM_JOB_NUM_NODES; task++)); do
    SLURM_PROCID=$task SLURM_NTASKS=$SLURM_JOB_NUM_NODES "${@:3}" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit "${status:-0}"
"""


def submitted(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the batch script as Slurm would on two nodes; the port is a free one."""
    srun = folder / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    script = SCRIPT.read_text().replace("29600", free_address().rpartition(":")[2])
    programs = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", script, "own_loop.sbatch", *words],
        cwd=folder,
        env={**os.environ, **WHOLE_LINES, "PATH": programs, "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
        timeout=12 * LONG_S,
    )


@pytest.mark.slow
def test_slurms_script_trains_the_example(tmp_path: Path) -> None:
    shown = submitted(tmp_path, str(ROOT / "examples/own_loop/train.py"), "60")
    assert shown.returncode == 0, shown.stderr
    words = re.findall(r"worker (\d): .* sum of the parameters (\S+)", shown.stdout)
    assert sorted(worker for worker, _ in words) == ["0", "1"], shown.stderr
    assert len({checksum for _, checksum in words}) == 1
    journal = read_journal(tmp_path / "runs" / "slurm-7" / "journal.jsonl")
    assert [record.reason for record in journal if isinstance(record, Left)] == ["finished"] * 2


def test_shellcheck_finds_nothing_in_slurms_script() -> None:
    done = subprocess.run([Path(sys.executable).with_name("shellcheck"), SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
