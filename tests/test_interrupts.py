"""Ctrl-C, whenever it comes: a readable journal, a folder that says so, one line for the user, and status 130."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from decentral.interrupts import whole
from decentral.journal import Joined, Record, Trained, read_journal

COMMAND = Path(sys.executable).with_name("decentral")

PARTS = """
import os, signal
from decentral.protocols import SyncRule
from decentral.tasks import Quadratic

def press():
    os.kill(os.getpid(), signal.SIGINT)

class Pressed(Quadratic):
    "A task whose user presses Ctrl-C when a model is made, or at the closing evaluation; it may say that it has begun."
    moment: str = "never"

    def model(self):
        if self.moment == "model": press()
        return super().model()

    def batch(self, worker, start, size):
        if self.moment == "says" and start == 0: print("begun", flush=True)
        return super().batch(worker, start, size)

    def evaluate(self, model):
        if self.moment == "end" and os.path.exists("here/journal.jsonl"): press()
        return super().evaluate(model)

class Alone(SyncRule):
    "Every worker trains on its own; the user presses Ctrl-C when worker 3 is at step `press_at`."
    press_at: int = -1

    async def run(self, peer):
        while await peer.train(2):
            if (peer.id, peer.step) == (3, self.press_at): press()
            if (peer.id, peer.step) == (3, 10): print("begun", flush=True)
"""


def command(*settings: str) -> list[str]:
    fields = ["rule=parts_of_user:Alone", "evaluate_every=0", "fleet.workers=[{count=4}]", *settings]
    overrides = [part for field in fields for part in ("--set", field)]
    return [str(COMMAND), "simulate", "--task", "parts_of_user:Pressed", "--out", "here", *overrides]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "parts_of_user.py").write_text(PARTS)
    return tmp_path


def check_stopped(folder: Path, status: int, out: str, err: str) -> list[Record]:
    """Check what every stopped run leaves; return its records."""
    assert (status, err) == (130, "")
    flat = " ".join(out.split())
    assert flat.endswith("stopped; the journal so far: here/journal.jsonl")
    assert json.loads((folder / "here/summary.json").read_text()) == {"stopped": "interrupted by Ctrl-C"}
    assert sorted(path.name for path in (folder / "here").iterdir()) == ["journal.jsonl", "run.toml", "summary.json"]
    text = (folder / "here/journal.jsonl").read_text()
    assert text.endswith("\n")
    records = list(read_journal(folder / "here/journal.jsonl"))
    assert len(records) == len(text.splitlines())
    return records


@pytest.mark.parametrize(
    ("setting", "trained"), [("rule.press_at=10", 5 * 4), ("task.moment=end", 10 * 4)], ids=["midway", "at the end"]
)
def test_a_run_that_is_stopped_leaves_what_it_did_and_says_so(folder: Path, setting: str, trained: int) -> None:
    done = subprocess.run(command("steps=20", setting), cwd=folder, capture_output=True, text=True, timeout=120)
    records = check_stopped(folder, done.returncode, done.stdout, done.stderr)
    assert sum(isinstance(record, Joined) for record in records) == 4
    assert sum(isinstance(record, Trained) for record in records) == trained


def test_a_signal_from_outside_stops_a_long_run(folder: Path) -> None:
    # As a terminal does: every process of the command gets it, those that compute for the simulation too.
    with subprocess.Popen(
        command("steps=1000000"),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert check_stopped(folder, process.returncode, out, err)


def test_a_comparison_that_is_stopped_says_how_it_goes_on(folder: Path) -> None:
    """Whichever of its processes were at work. What is complete is kept: `tests/compare/test_resuming.py`."""
    words = ["compare", "--rules", "ddp,local_sgd", "--task", "parts_of_user:Pressed", "--out", "fair", "--seeds", "2"]
    fields = ["task.moment=says", "evaluate_every=0", "steps=1000000"]
    overrides = [part for field in fields for part in ("--set", field)]
    with subprocess.Popen(
        [str(COMMAND), *words, *overrides],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "begun\n":
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    last = " ".join(out.replace("begun", "").split())
    assert (process.returncode, err) == (130, "")
    assert last == "stopped; the same command with --out fair goes on from the runs that are complete"
    with pytest.raises(ProcessLookupError):  # nobody of them is left
        os.killpg(process.pid, 0)


def test_a_run_that_had_not_begun_leaves_nothing(folder: Path) -> None:
    done = subprocess.run(command("task.moment=model"), cwd=folder, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "")
    assert done.stdout.strip() == "stopped; the run had not begun"
    assert not (folder / "here").exists()


def test_a_record_is_written_whole_before_ctrl_c_is_heeded() -> None:
    begun: list[int] = []
    ended: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 2:
            signal.raise_signal(signal.SIGINT)
        ended.append(item)

    before = signal.getsignal(signal.SIGINT)
    with whole(work) as do:
        do(1)
        with pytest.raises(KeyboardInterrupt):
            do(2)
        do(3)  # what is torn down afterwards may still tell
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert begun == ended == [1, 2, 3]
    assert signal.getsignal(signal.SIGINT) is before
