"""Runs of a comparison side by side on Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import cluster

from decentral.compare.comparison import read_comparison
from decentral.compare.entries import entries_of
from decentral.compare.parallel import on_ray
from decentral.compare.plan import Plan
from decentral.compare.work import work_through
from decentral.config import Run
from decentral.errors import TaskError
from decentral.protocols import DiLoCo
from decentral.protocols.schedule import Every

pytestmark = pytest.mark.usefixtures("ray_cluster")


def plan_of(run: Run) -> Plan:
    return Plan({"run": entries_of(run, ["ddp", "diloco"])}, (0, 1), "seconds", None)


def test_the_same_bits_as_one_after_the_other(tmp_path: Path) -> None:
    run = cluster(DiLoCo(period=Every(period=4)), 3, 12, task={"name": "quadratic", "noise": 1.0})
    plan, told = plan_of(run.model_copy(update={"evaluate_every": 4})), list[str]()
    on_ray(plan, list(plan.jobs()), tmp_path / "ray", "auto", told.append)
    work_through(plan, tmp_path / "here")
    for job in plan.jobs():
        for name in ("journal.jsonl", "model.safetensors", "summary.json"):
            there, here = (tmp_path / place / job.folder / name for place in ("ray", "here"))
            assert there.read_bytes() == here.read_bytes()
    assert told[0] == "0 of 4 runs done, the others side by side"
    assert len(read_comparison(plan, tmp_path / "ray", {}).rows) == 2


def test_an_error_comes_back_as_itself(tmp_path: Path) -> None:
    run = cluster(DiLoCo(period=Every(period=4)), 2, 4, task={"name": "fashion_mnist", "folder": str(tmp_path)})
    plan = plan_of(run)
    with pytest.raises(TaskError, match="fashion_mnist: no "):
        on_ray(plan, list(plan.jobs()), tmp_path / "out", "auto", lambda _words: None)
    assert not (tmp_path / "out").exists()
