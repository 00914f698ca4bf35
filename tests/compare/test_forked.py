"""Runs of a comparison side by side in forked processes."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from cluster import NET, cluster
from torch import Tensor, nn

from decentral.compare.entries import entries_of
from decentral.compare.forked import side_by_side
from decentral.compare.one import carry_out, is_complete
from decentral.compare.plan import Plan
from decentral.compare.work import work_through
from decentral.config import Sim
from decentral.errors import RunError, TaskError
from decentral.protocols import DiLoCo
from decentral.protocols.schedule import Every
from decentral.tasks import Quadratic

LONG = """
import sys
from pathlib import Path
from decentral.compare import compare
from decentral.config import Run
run = Run(steps=1_000_000, task={"name": "quadratic"}, rule={"name": "diloco", "period": 4}, sim={"processes": 2})
compare(run, ["ddp", "diloco"], folder=Path(sys.argv[1]), tell=lambda words: print(words, flush=True))
"""
FILES = ("journal.jsonl", "model.safetensors", "summary.json")


class Collects(Quadratic):
    """A task that has the garbage of its process collected."""

    name: ClassVar[str] = ""

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        gc.collect()
        return super().loss(model, batch)


class Fatal(Quadratic):
    """A task whose process dies in the midst of a run."""

    name: ClassVar[str] = ""

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


def plan_of(**fields: object) -> Plan:
    run = cluster(DiLoCo(period=Every(period=4)), 3, 12, task=NET).model_copy(update={"evaluate_every": 4, **fields})
    return Plan({"run": entries_of(run, ["ddp", "diloco"])}, (0, 1), "seconds", None)


def test_the_same_bytes_as_one_after_the_other(tmp_path: Path) -> None:
    plan, told = plan_of(sim=Sim(processes=2)), list[str]()
    work_through(plan, tmp_path / "forked", tell=told.append)
    for job in plan.jobs():
        here = tmp_path / "here" / job.folder
        here.parent.mkdir(parents=True, exist_ok=True)
        carry_out(job.run, job.baseline, plan.equal, plan.budget, here)
        for name in FILES:
            assert (tmp_path / "forked" / job.folder / name).read_bytes() == (here / name).read_bytes()
    assert told[0] == "0 of 4 runs done, the others side by side"
    assert [path.name for path in (tmp_path / "forked").glob("*/*.part")] == []


def test_an_error_comes_back_as_itself_and_ends_the_others(tmp_path: Path) -> None:
    plan = plan_of(task={"name": "fashion_mnist", "folder": str(tmp_path)})
    with pytest.raises(TaskError, match="fashion_mnist: no "):
        side_by_side(plan, list(plan.jobs()), tmp_path / "out", 2, lambda _words: None)
    assert not any(is_complete(tmp_path / "out" / job.folder) for job in plan.jobs())


def test_a_process_that_dies_is_told_of(tmp_path: Path) -> None:
    plan = plan_of(task={"name": f"{__name__}:Fatal"})
    with pytest.raises(RunError, match=r"the process of (ddp|diloco), seed 0 has died \(exit code -9\)"):
        side_by_side(plan, list(plan.jobs()), tmp_path, 2, lambda _words: None)


class Lasting:
    """What must not be collected but where it was made: a gRPC channel ends by a thread that no fork has."""

    def __init__(self, trace: Path) -> None:
        self._trace, self._made_in, self._itself = trace, os.getpid(), self

    def __del__(self) -> None:
        if os.getpid() != self._made_in:
            self._trace.touch()


def test_what_the_parent_has_left_to_collect_is_left_to_it(tmp_path: Path) -> None:
    trace = tmp_path / "collected"
    gc.disable()
    try:
        Lasting(trace)
        work_through(plan_of(task={"name": f"{__name__}:Collects"}, sim=Sim(processes=2)), tmp_path / "out")
    finally:
        gc.enable()
    assert not trace.exists()


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGINT])
def test_the_processes_end_with_the_comparison(tmp_path: Path, ended_by: signal.Signals) -> None:
    command = [sys.executable, "-c", LONG, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0 of 2 runs done, the others side by side\n"
        process.send_signal(ended_by)
        process.communicate(timeout=60)  # to the end of a pipe that they hold too
    assert process.returncode != 0
