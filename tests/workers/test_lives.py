"""Workers and coordinators that die on a real Ray, and what takes their place.

A simulation comes to the bits of a real run that nothing has happened to (`tests/worlds`).
"""

from __future__ import annotations

import os
import signal
import socket
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import ray
import ray._private.state
from cluster import all_equal, outcomes

from decentral.config import Run, validated
from decentral.journal import Joined, Left, Record, Synced, Trained
from decentral.sim.simulate import simulate
from decentral.workers.launch import train

pytestmark = pytest.mark.usefixtures("ray_cluster")
STEPS = 1000


def run_of(**task: object) -> Run:
    return validated(
        {
            "steps": STEPS,
            "batch_size": 1,
            "evaluate_every": 0,
            "task": {"name": "tests.workers.faulty_tasks:Gated", "dimension": 64, **task},
            "inner": {"name": "sgd", "lr": 0.1},
            "rule": {"name": "diloco", "period": 10},
            "fleet": {"workers": [{"count": 3}]},
        },
        "churn",
    )


def pid_of(actor: str) -> int:
    """Return the process of the run's newest living actor of that name, such as "worker-1"."""
    found = [
        fields["Pid"]
        for fields in ray._private.state.actors().values()
        if fields["State"] == "ALIVE" and actor in fields["Name"]
    ]
    (pid,) = found
    return int(pid)


class Killer:
    """Sends an actor a signal when the driver hears that somebody has settled a round."""

    def __init__(self, actor: str, after_round: int, number: signal.Signals = signal.SIGKILL) -> None:
        self._actor, self._after_round, self._number = actor, after_round, number
        self.has_struck = False

    def __call__(self, record: Record) -> None:
        if isinstance(record, Synced) and record.round >= self._after_round and not self.has_struck:
            self.has_struck = True
            os.kill(pid_of(self._actor), self._number)


def test_a_worker_that_is_killed_gets_another_life_and_takes_part(tmp_path: Path) -> None:
    """The others stand still in mid-run until it is back."""
    kill, gate, lives = Killer("worker-1", 5), tmp_path / "open", Counter[int]()

    def see(record: Record) -> None:
        lives[record.worker] += isinstance(record, Joined)
        if lives[1] == 2:
            gate.touch()
        kill(record)

    outcome = train(run_of(gate=str(gate), at=200), on_record=see)
    assert all_equal(outcome)
    assert sorted(outcome.params) == [0, 1, 2]
    victim = 1
    ends = [record.reason for record in outcome.records if isinstance(record, Left) and record.worker == victim]
    assert ends in (["crashed", "finished"], ["stalled", "finished"])  # by who noticed first
    lives = [record for record in outcome.records if isinstance(record, Joined) and record.worker == victim]
    assert len(lives) == 2
    assert outcomes(outcome)[-1] == {("committed", (0, 1, 2))}
    trained = [record for record in outcome.records if isinstance(record, Trained) and record.worker == victim]
    assert sum(record.samples for record in trained) < STEPS


def test_a_coordinator_that_is_killed_comes_back_and_changes_nothing(tmp_path: Path) -> None:
    """Although nobody can write checkpoints meanwhile."""
    owner, kill = tmp_path / "owner.json", Killer("coordinator", 5)

    def see(record: Record) -> None:
        if owner.is_file():
            owner.unlink()
            owner.mkdir()  # as good as a full disk, also to root
        kill(record)

    quiet = simulate(run_of())
    outcome = train(validated({**run_of().to_fields(), "checkpoint": {"url": str(tmp_path)}}, "churn"), on_record=see)
    assert kill.has_struck
    assert owner.is_dir()
    assert all_equal(outcome)
    assert outcome.params[0].equal(quiet.params[0])
    assert [outcomes(outcome)] == [outcomes(quiet)]
    assert [left.reason for left in outcome.left()] == ["finished"] * 3
    for worker in range(3):  # no record is lost, and none there twice
        steps = [record.step for record in outcome.records if isinstance(record, Trained) and record.worker == worker]
        assert steps == list(range(10, STEPS + 1, 10))


def test_a_run_that_has_lost_all_its_workers_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    """It comes to the end of a run that nothing befell, and the journal has every local step once."""
    kept, records, lost = tmp_path / "kept", list[Record](), list[int]()

    def see(record: Record) -> None:
        records.append(record)
        if isinstance(record, Synced) and not lost and list(kept.glob("*/manifest.json")):
            lost.extend(pid_of(f"worker-{worker}") for worker in range(3))
            for pid in lost:
                os.kill(pid, signal.SIGKILL)

    def restart(before: Iterable[Record]) -> None:
        records[:] = before

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    quiet = run_of(name="tests.workers.faulty_tasks:Faulty").to_fields() | {"steps": 300}
    slow = {"name": "tests.workers.faulty_tasks:Faulty", "dimension": 64, "fault": "slow"}
    fields = {"task": slow, "checkpoint": {"url": str(kept), "every_s": 0.2}, "real": {"port": port}}
    outcome = train(validated({**quiet, **fields}, "churn"), on_record=see, on_restart=restart)
    assert lost
    assert list(outcome.records) == records
    assert outcome.params[0].equal(simulate(validated(quiet, "quiet")).params[0])
    assert all_equal(outcome)
    assert [left.reason for left in outcome.left()] == ["finished"] * 3
    for worker in range(3):
        steps = [record.step for record in records if isinstance(record, Trained) and record.worker == worker]
        assert steps == list(range(10, 301, 10))


def test_a_worker_that_is_told_in_time_goes_between_two_rounds(tmp_path: Path) -> None:
    """The run stands still in its midst until it has been told."""
    tell, gate = Killer("worker-1", 5, signal.SIGTERM), tmp_path / "open"

    def see(record: Record) -> None:
        tell(record)
        if tell.has_struck:
            gate.touch()

    run = validated({**run_of(gate=str(gate), at=600).to_fields(), "leases": True}, "told")
    outcome = train(run, on_record=see)
    assert all_equal(outcome)
    records = [record for record in outcome.records if record.worker == 1]
    end = next(place for place, record in enumerate(records) if isinstance(record, Left))
    assert records[end].reason == "preempted"  # another life of it may follow before the others are done
    assert "skipped" not in {said for found in outcomes(outcome) for said, _ in found}
    last = max(record.step for record in records[:end] if isinstance(record, Trained))
    rounds = max(record.round for record in records[:end] if isinstance(record, Synced))
    assert last == 10 * rounds  # nothing that it has trained on is lost
    found = outcome.coverage()
    unsettled = sum(stop - start for start, stop in found.missing)  # leased ahead, and given back too late for anybody
    trained = sum(record.samples for record in outcome.records if isinstance(record, Trained))
    assert found.repeated == ()
    assert found.samples - unsettled == trained
