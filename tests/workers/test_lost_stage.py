"""A stage whose actor is killed on a real Ray is rebuilt, and its row goes on from where it was."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from blocks import Chain
from test_lives import pid_of

from decentral.config import Run, validated
from decentral.journal import Rebuilt, Record, Trained
from decentral.sim.simulate import simulate
from decentral.workers.launch import train

pytestmark = pytest.mark.usefixtures("ray_cluster")
STEPS = 160
CHAIN = {"name": f"tests.blocks:{Chain.__name__}", "layers": 6}
FOUR = {"workers": [{"count": 4}]}


def run_of(**fields: Any) -> Run:
    return validated(
        {
            "steps": STEPS,
            "batch_size": 4,
            "evaluate_every": 0,
            "task": CHAIN,
            "rule": {"name": "local_sgd", "period": 20},
            "inner": {"name": "adamw", "lr": 1e-3},
            "pipeline": {"stages": 3, "microbatches": 2},
            "fleet": {"workers": [{"count": 3}]},
            **fields,
        },
        "test",
    )


def test_stages_that_are_killed_in_mid_batch_are_rebuilt_and_nobody_goes_back() -> None:
    """One of the middle, the first and the last, one after the other: whose mirrors have learned their work."""
    victims, killed = (2, 0, 3), list[int]()

    def see(record: Record) -> None:
        if isinstance(record, Trained) and record.step >= 40 * (len(killed) + 1) and len(killed) < len(victims):
            killed.append(victims[len(killed)])
            os.kill(pid_of(f"worker-{killed[-1]}"), signal.SIGKILL)

    pipeline = {"stages": 4, "microbatches": 2, "recovery": "checkfree_plus"}
    outcome = train(run_of(pipeline=pipeline, task=CHAIN | {"layers": 8}, fleet=FOUR), on_record=see)
    rebuilt = [(record.worker, record.members) for record in outcome.records if isinstance(record, Rebuilt)]
    assert rebuilt == [(2, (3,)), (0, (1,)), (3, (2,))]
    ends = [(left.worker, left.reason == "finished") for left in outcome.left()]
    assert sorted(ends) == sorted([(worker, True) for worker in range(4)] + [(victim, False) for victim in victims])
    steps = [record.step for record in outcome.records if isinstance(record, Trained) and record.worker == 1]
    assert steps == list(range(20, STEPS + 1, 20))  # every step once
    assert outcome.after["loss"] < outcome.before["loss"]


def test_two_stages_beside_each_other_go_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    """Nobody can rebuild them; the run comes to what one comes to that nothing befell, and says that it went back."""
    kept, killed, restarts = tmp_path / "kept", list[int](), list[int]()

    def see(record: Record) -> None:
        if isinstance(record, Trained) and not killed and list(kept.glob("*/manifest.json")):
            killed.extend(pid_of(f"worker-{worker}") for worker in (0, 1))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    def restart(before: Iterable[Record]) -> None:
        restarts.append(len(list(before)))

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fields = {"checkpoint": {"url": str(kept), "every_s": 0.2}, "real": {"port": port}}
    outcome = train(run_of(**fields), on_record=see, on_restart=restart)
    assert killed
    assert len(restarts) == 1
    assert outcome.merged().equal(simulate(run_of()).merged())
    assert [left.reason for left in outcome.left()] == ["finished"] * 3
