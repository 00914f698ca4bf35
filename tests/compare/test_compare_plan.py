"""Which runs a comparison has, where they go, and when two comparisons are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cluster import NET, cluster

from decentral.compare.entries import entries_of
from decentral.compare.plan import Plan, check_names, differences, require_same
from decentral.config import Run
from decentral.errors import ConfigError
from decentral.protocols import DiLoCo
from decentral.protocols.schedule import Every
from decentral.replica import held_out

TEXT = {"name": "byte_gpt", "width": 8, "depth": 1, "heads": 1, "context": 8}
RUN = cluster(DiLoCo(period=Every(period=4)))


def plan_of(*runs: Run, seeds: tuple[int, ...] | None = None, **options: Any) -> Plan:
    entries = {f"w{count}": entries_of(run, ["ddp", "diloco"]) for count, run in enumerate(runs)}
    return Plan(entries, seeds, "samples", None, **options)


def test_every_entry_has_every_seed_and_a_folder_of_its_own() -> None:
    jobs = list(plan_of(RUN, RUN, seeds=(0, 4)).jobs())
    assert [str(job.folder) for job in jobs] == [
        f"w{workload}/{rule}/seed-{seed}" for workload in (0, 1) for seed in (0, 4) for rule in ("ddp", "diloco")
    ]
    assert all(job.run.seed == job.baseline.seed == job.seed for job in jobs)
    assert {job.baseline.rule.spelling() for job in jobs} == {"ddp"}


def test_a_single_run_file_with_its_own_seed_needs_no_folders_between() -> None:
    run = RUN.model_copy(update={"seed": 7})
    jobs = list(plan_of(run).jobs())
    assert [(str(job.folder), job.seed, job.run.seed) for job in jobs] == [("ddp", 7, 7), ("diloco", 7, 7)]


@pytest.mark.parametrize(
    ("task", "moved"),
    [({"name": "quadratic", "noise": 1.0}, True), (NET, False), ({"name": "layer_stack"}, True)],
)
def test_a_seed_chooses_the_samples_of_tasks_that_let_it(task: dict[str, Any], moved: bool) -> None:
    jobs = list(plan_of(cluster(DiLoCo(), task=task), seeds=(0, 1)).jobs())
    assert [job.run.task.get("sample_seed") for job in jobs] == ([0, 0, 1, 1] if moved else [None] * 4)
    batches = [str(job.run.make_task().batch(0, 0, 4)) for job in jobs]
    assert batches[0] == batches[1], "all rules see the same samples"
    assert (batches[0] != batches[2]) == moved


@pytest.mark.parametrize("task", [TEXT, {"name": "quadratic", "noise": 1.0}, {"name": "layer_stack"}])
def test_held_out_data_is_the_same_for_all_seeds(task: dict[str, Any]) -> None:
    seeds: list[dict[str, Any]] = [{}, {"sample_seed": 0}, {"sample_seed": 1}]
    plain, usual, other = (cluster(DiLoCo(), task={**task, **seed}).make_task() for seed in seeds)
    assert str(plain.batch(0, 0, 4)) == str(usual.batch(0, 0, 4)) != str(other.batch(0, 0, 4))
    assert held_out(usual, 0) == held_out(other, 0)


def test_names_that_would_share_a_folder_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"entries of one name: a/b, a:b"):
        check_names(Plan({"run": [("a:b", RUN), ("a/b", RUN)]}, None, "samples", None))


def test_what_changes_nothing_makes_no_difference() -> None:
    changed = RUN.model_copy(update={"sim": RUN.sim.model_copy(update={"processes": 1})})
    assert differences(plan_of(RUN).to_fields(), plan_of(changed).to_fields()) == []


def test_another_comparison_is_told_apart_by_name_and_value() -> None:
    here = plan_of(RUN.model_copy(update={"steps": 99}), seeds=(0, 1)).to_fields()
    with pytest.raises(ConfigError, match="another comparison") as refused:
        require_same(plan_of(RUN).to_fields(), here, Path("out"))
    text = str(refused.value)
    assert "workloads.w0.ddp.steps: 12 there, 99 here" in text
    assert "seeds: None there, [0, 1] here" in text


def test_a_message_names_a_few_differences_and_counts_the_rest() -> None:
    there, here = {str(n): 0 for n in range(9)}, {str(n): 1 for n in range(9)}
    with pytest.raises(ConfigError, match=r"4: 0 there, 1 here; and 4 more\. Name another folder"):
        require_same(there, here, Path("out"))
