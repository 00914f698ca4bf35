"""Everything is killed, and the run goes on from its newest checkpoint as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from decentral.coverage import coverage
from decentral.journal import Trained, read_journal

RUN = """
steps = 300
batch_size = 1
evaluate_every = 0
leases = {leases}
task = {{name = "quadratic", dimension = 64}}
rule = {{name = "diloco", period = 10, codec = "int8"}}
inner = {{name = "adamw", lr = 0.01}}
fleet = {{workers = [{{count = 2, speed = 0.005}}]}}
checkpoint = {{url = "{kept}", every_s = 0.2}}
"""


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """Start `decentral train` as a user would, in a session of its own."""
    command = [sys.executable, "-m", "decentral.cli", "train", *arguments]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True, stdout=subprocess.PIPE)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to the driver and to whatever it has started: Ray makes process groups of its own."""
    for other in processes_below(process.pid):
        os.kill(other, signal.SIGKILL)
    process.wait(timeout=30)


def processes_below(root: int) -> list[int]:
    """Return the process and all its descendants."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        parents[int(status.parent.name)] = int(fields[1])
    found = [root]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


@pytest.mark.parametrize("leases", ["false", "true"])
def test_a_run_that_was_killed_goes_on_to_the_same_end(tmp_path: Path, leases: str) -> None:
    kept, folder, run_file = tmp_path / "kept", tmp_path / "run", tmp_path / "run.toml"
    run_file.write_text(RUN.format(kept=kept, leases=leases))
    first = start(str(run_file), "--out", str(folder))
    deadline = time.monotonic() + 120
    while not list(kept.glob("*/manifest.json")):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.05)
    kill_all(first)
    assert not (folder / "summary.json").exists()  # it was still training
    quick = ("--set", "fleet.workers=[{count=2}]")
    second = start("--resume", str(folder), "--json", *quick)
    printed = second.communicate(timeout=240)[0]
    assert second.returncode == 0
    assert json.loads(printed)
    if leases == "true":  # who gets which samples depends on who asks first
        assert_accounted_for(folder)
        return
    quiet = tmp_path / "quiet"
    third = start(str(run_file), "--out", str(quiet), "--set", 'checkpoint.url=""', *quick)
    third.communicate(timeout=240)
    assert third.returncode == 0
    for worker in (0, 1):
        losses = [losses_of(path, worker) for path in (folder, quiet)]
        assert losses[0] == losses[1]
    went_on, undisturbed = (load_file(path / "model.safetensors") for path in (folder, quiet))
    assert all(torch.equal(went_on[name], undisturbed[name]) for name in undisturbed)


def assert_accounted_for(folder: Path) -> None:
    """Assert that by the journal, which is one although it was written in two goes, every sample was used once."""
    found = coverage(read_journal(folder / "journal.jsonl"))
    assert found.consumed >= 600  # as many as two workers train on in 300 local steps
    assert found.repeated == ()


def losses_of(folder: Path, worker: int) -> dict[int, float | None]:
    """Return the mean loss of each local phase, by the step with which it ended; none is there twice."""
    trained = [
        record
        for record in read_journal(folder / "journal.jsonl")
        if isinstance(record, Trained) and record.worker == worker
    ]
    assert len({record.step for record in trained}) == len(trained)
    return {record.step: record.loss for record in trained}
