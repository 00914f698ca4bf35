"""Everything is killed, and the run goes on from its newest checkpoint as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from decentral.config import read_run
from decentral.coverage import coverage
from decentral.folder import checkpoint
from decentral.journal import Record, Trained, read_journal
from decentral.sim.simulate import simulate

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


@pytest.mark.slow
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
    second = start("--resume", str(folder), "--json", "--set", "fleet.workers=[{count=2}]")
    printed = second.communicate(timeout=240)[0]
    assert second.returncode == 0
    assert json.loads(printed)
    if leases == "true":  # who gets which samples depends on who asks first
        assert_accounted_for(folder)
        return
    run = read_run(run_file)
    undisturbed = simulate(run)  # comes to the bits of a real run that nothing has happened to
    for worker in (0, 1):
        assert losses_of(read_journal(folder / "journal.jsonl"), worker) == losses_of(undisturbed.records, worker)
    went_on, expected = load_file(folder / "model.safetensors"), checkpoint(undisturbed, run.make_task(), run.seed)
    assert went_on.keys() == expected.keys()
    assert all(went_on[name].equal(expected[name]) for name in expected)


def assert_accounted_for(folder: Path) -> None:
    """Assert that by the journal, which is one although it was written in two goes, every sample was used once."""
    found = coverage(read_journal(folder / "journal.jsonl"))
    assert found.consumed >= 600  # as many as two workers train on in 300 local steps
    assert found.repeated == ()


def losses_of(records: Iterable[Record], worker: int) -> dict[int, float | None]:
    """Return the mean loss of each local phase, by the step with which it ended; none is there twice."""
    trained = [record for record in records if isinstance(record, Trained) and record.worker == worker]
    assert len({record.step for record in trained}) == len(trained)
    return {record.step: record.loss for record in trained}
