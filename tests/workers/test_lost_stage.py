"""A stage whose actor is killed on a real Ray is rebuilt, and its row goes on from where it was."""

from __future__ import annotations

import os
import signal
import socket
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.exceptions
import torch
from blocks import Chain
from test_lives import pid_of

from decentral.config import Run, validated
from decentral.journal import Joined, Rebuilt, Record, Trained
from decentral.report.summary import summarize
from decentral.sim.simulate import simulate
from decentral.workers.launch import train
from decentral.workers.places import Spare, Spares
from decentral.workers.status import Tally

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


@pytest.mark.slow
def test_a_lost_place_is_gone_on_without_and_taken_again_when_it_is_back(tmp_path: Path) -> None:
    """Of four CPUs others have one, and get the one of a worker that is killed; then they let go of it.

    Nobody goes back to a checkpoint, of which there is none: who has no place lives beside another until the model is
    cut anew, begins there with the copy that has been kept, and states go from worker to worker.
    """
    other = ray.remote(Spare).options(num_cpus=1)
    settled = other.remote()
    ray.get(settled.placed.remote())
    waiting, killed, joined, restarts = list[Any](), list[int](), Counter[int](), list[int]()

    def see(record: Record) -> None:
        joined[record.worker] += isinstance(record, Joined)
        if not waiting:  # all are there: the next place is for the other
            waiting.append(other.remote())
        if isinstance(record, Trained) and not killed and record.step == 20:
            killed.append(pid_of("worker-1"))
            os.kill(killed[0], signal.SIGKILL)
        if isinstance(record, Trained) and joined[0] == 2:
            ray.kill(waiting[0])

    def restart(before: Iterable[Record]) -> None:
        restarts.append(max(record.step for record in before if isinstance(record, Trained)))

    fields: dict[str, Any] = {"steps": 100, "rule": {"name": "diloco", "period": 5}}
    quiet = simulate(run_of(**fields))
    fields |= {"pipeline": {"stages": 3, "least": 2, "microbatches": 2, "recovery": "redundant"}, "patience_s": 1.0}
    fields |= {"checkpoint": {"url": str(tmp_path / "kept"), "every_s": 1000.0}}
    fields |= {"fleet": {"workers": [{"count": 3, "speed": 0.03}]}}
    run = run_of(**fields)
    outcome = train(run, on_record=see, on_restart=restart)
    ray.kill(settled)
    assert Counter(left.reason for left in outcome.left()) == {
        "crashed": 1,
        "cut anew, 3 to 2 stages": 3,
        "cut anew, 2 to 3 stages": 2,
        "finished": 3,
    }
    assert [(record.worker, record.stage) for record in outcome.records if isinstance(record, Rebuilt)] == [(1, 1)]
    steps = [record.step for record in outcome.records if isinstance(record, Trained) and record.worker == 0]
    assert steps == list(range(5, 101, 5))  # every step once
    outcome.verify()
    losses = [record.loss for record in outcome.records if isinstance(record, Trained) and record.loss is not None]
    expected = [record.loss for record in quiet.records if isinstance(record, Trained) and record.loss is not None]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(outcome.merged(), quiet.merged(), rtol=0, atol=1e-5)
    assert outcome.samples() == quiet.samples()
    assert len(restarts) == 2
    assert len(summarize(run, run.make_task(), outcome)["workers"]) == 9
    status = Tally()
    for record in outcome.records:
        status.see(record)
    assert [worker["state"] for worker in status.status("a run")["workers"]] == ["finished"] * 3


@pytest.mark.slow
def test_what_nobody_can_rebuild_and_has_no_place_goes_on_whole_from_the_newest_checkpoint(tmp_path: Path) -> None:
    """Two stages beside each other and their places are gone: the run goes back once, to one worker that has it all."""
    settled = ray.remote(Spare).options(num_cpus=1).remote()
    ray.get(settled.placed.remote())  # of four CPUs
    kept, others, killed, restarts = tmp_path / "kept", list[Any](), list[int](), list[int]()

    def see(record: Record) -> None:
        if not others:  # all are there: the next places are for others
            others.extend(ray.remote(Spare).options(num_cpus=1).remote() for _ in range(2))
        if isinstance(record, Trained) and not killed and list(kept.glob("*/manifest.json")):
            killed.extend(pid_of(f"worker-{worker}") for worker in (0, 1))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    def restart(before: Iterable[Record]) -> None:
        restarts.append(len(list(before)))

    fields: dict[str, Any] = {"steps": 60, "rule": {"name": "diloco", "period": 5}}
    quiet = simulate(run_of(**fields))
    fields |= {"pipeline": {"stages": 3, "least": 1, "microbatches": 2}, "patience_s": 1.0}
    fields |= {"checkpoint": {"url": str(kept), "every_s": 0.2}, "fleet": {"workers": [{"count": 3, "speed": 0.05}]}}
    outcome = train(run_of(**fields), on_record=see, on_restart=restart)
    for other in (settled, *others):
        ray.kill(other)
    assert len(restarts) == 1
    assert Counter(left.reason for left in outcome.left()) == {"cut anew, 3 to 1 stages": 3, "finished": 1}
    assert torch.allclose(outcome.merged(), quiet.merged(), rtol=0, atol=1e-5)


def test_places_count_that_are_still_there() -> None:
    actors = []

    def ask(_name: str) -> Any:
        actors.append(ray.remote(Spare).options(num_cpus=1).remote())
        return actors[-1]

    spares = Spares(ask, 2)
    assert not spares.are_there()
    spares.want()
    spares.want()
    ray.get([actor.placed.remote() for actor in actors])
    assert spares.are_there()
    ray.kill(actors[0])
    with suppress(ray.exceptions.RayActorError):
        while True:  # until its death is known
            ray.get(actors[0].placed.remote())
    assert not spares.are_there()
    spares.want()
    assert len(actors) == 4
    spares.forget()
