"""Whole comparisons: what stands in rows, scores, folders and documents."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from cluster import NET, cluster
from rich.console import Console

from decentral.compare import Comparison, compare
from decentral.compare.files import write_report
from decentral.compare.intervals import estimate
from decentral.config import Run
from decentral.errors import ConfigError
from decentral.fleet import WorkerGroup
from decentral.protocols import DiLoCo, OuterSGD
from decentral.protocols.schedule import Every
from decentral.report.curves import MEASURES
from decentral.sim.simulate import simulate

NOISY = {"name": "quadratic", "noise": 2.0, "spread": 0.0}


def workload(**fields: object) -> Run:
    run = cluster(DiLoCo(period=Every(period=4), outer=OuterSGD(lr=1.0)), 3, 24, task=NOISY, up_bps=1e5)
    return run.model_copy(update={"evaluate_every": 4, **fields})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Three seeds of two rules and a control."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    return compare(workload(), ["ddp", "diloco"], seeds=3, controls=True, folder=folder)


def test_a_row_says_what_its_runs_came_to(found: Comparison) -> None:
    ddp, diloco, *_ = found.rows
    runs = [simulate(workload(seed=seed, task={**NOISY, "sample_seed": seed}).with_rule("diloco")) for seed in range(3)]
    losses = [run.after["loss"] for run in runs]
    assert diloco["finals"] == losses
    assert diloco["final"] == {"mean": estimate(losses).mean, "margin": estimate(losses).margin}
    assert diloco["difference"]["mean"] == pytest.approx(diloco["final"]["mean"] - ddp["final"]["mean"])
    assert diloco["bytes"] == sum(left.sent_bytes for run in runs for left in run.left()) / 3
    assert diloco["bytes_sent_per_worker"] == pytest.approx(diloco["bytes"] / 3)
    assert diloco["virtual_seconds"] == sum(run.seconds for run in runs) / 3
    assert (diloco["steps"], diloco["samples"], diloco["dollars"]) == (24, 3 * 24, None)
    assert ddp["difference"] is None
    assert len(set(losses)) == 3, "seeds move the samples"


def test_all_rules_start_alike_with_each_seed(found: Comparison) -> None:
    assert found.rows[0]["before"] == found.rows[1]["before"]


def test_controls_get_the_same_samples(found: Comparison) -> None:
    alone, outer = found.rows[2:]
    assert (alone["rule"], outer["rule"]) == ("one_worker", "one_worker_diloco")
    assert {row["samples"] for row in found.rows} == {3 * 24}
    assert [row["steps"] for row in found.rows] == [24, 24, 72, 72]
    assert alone["finals"] == pytest.approx(outer["finals"]), "outer SGD of rate 1 changes nothing on one worker"


def test_half_of_the_baselines_runs_reach_its_own_target(found: Comparison) -> None:
    ddp = found.rows[0]
    assert found.targets["run"] == sorted(ddp["finals"])[1]
    assert ddp["reached"] >= 2
    assert ddp["to_target"]["steps"] <= 24
    assert 0 < ddp["to_target"]["bytes"] <= ddp["bytes"]


def test_times_to_a_target_are_those_of_the_curves(found: Comparison, tmp_path: Path) -> None:
    folder = Path(found.rows[0]["runs"][0]["folder"]).parent.parent
    target = found.results["run", "diloco"][0].curve.points[2].value
    again = compare(workload(), ["ddp", "diloco"], seeds=3, controls=True, folder=folder, target=target)
    used = again.rows[1]["runs"][0]["to_target"]
    first = next(point for point in again.results["run", "diloco"][0].curve.points if point.value <= target)
    assert used == {measure: getattr(first, measure) for measure in MEASURES}
    assert again.targets == {"run": target}


def test_the_document_is_json_without_infinities(found: Comparison) -> None:
    document = json.loads(json.dumps(found.to_fields(), allow_nan=False))
    assert (document["version"], document["seeds"], document["equal"]) == (1, [0, 1, 2], "samples")
    assert document["workloads"] == {"run": {"headline": "loss", "target": found.targets["run"]}}
    assert [row["rule"] for row in document["rows"]] == ["ddp", "diloco", "one_worker", "one_worker_diloco"]
    assert set(document["scores"]) == set(MEASURES) - {"dollars"}


def test_folders_pictures_and_figures_are_left(found: Comparison) -> None:
    folder = Path(found.rows[0]["runs"][0]["folder"]).parent.parent
    text = write_report(found, folder)
    assert (folder / "comparison.json").read_text() == text
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    for row in found.rows:
        for seed, run in enumerate(row["runs"]):
            place = Path(run["folder"])
            assert place == folder / row["rule"] / f"seed-{seed}"
            assert {path.name for path in place.iterdir()} == {
                *("journal.jsonl", "model.safetensors", "run.toml", "summary.json")
            }


def test_the_table_fits_a_usual_terminal_and_says_what_controls_are(found: Comparison) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found.table())
    text = console.export_text()
    assert "…" not in text
    assert "one_worker: the fleet's first worker by itself" in text
    assert "95 % t-intervals" in text
    assert "ddp's at its end" in text


def test_equal_seconds_gives_the_quicker_rule_more_steps() -> None:
    found = compare(workload(), ["ddp", "diloco"], equal="seconds")
    ddp, diloco = found.rows
    assert diloco["steps"] > ddp["steps"] == 24
    assert 0.8 * ddp["virtual_seconds"] < diloco["virtual_seconds"] <= ddp["virtual_seconds"]


def test_a_budget_of_bytes_holds_for_all() -> None:
    found = compare(workload(), ["diloco", "ddp"], equal="bytes", budget=8e3)
    assert all(0.6 * 8e3 < row["bytes"] <= 8e3 for row in found.rows)
    assert found.rows[0]["steps"] > found.rows[1]["steps"]


def test_dollars_are_rent_and_egress() -> None:
    run = workload()
    workers = (WorkerGroup(count=3, dollars_per_hour=3600.0),)
    run = run.model_copy(update={"fleet": run.fleet.model_copy(update={"workers": workers})})
    (row,) = compare(run, ["diloco"]).rows
    assert row["dollars"] == pytest.approx(3 * row["virtual_seconds"], rel=0.05)
    assert row["to_target"]["dollars"] <= row["dollars"]


def test_workloads_are_scored_together() -> None:
    """Each is the first on one of the two: bytes speak for DiLoCo on both."""
    found = compare({"a": workload(), "b": workload(task=NET)}, ["ddp", "diloco"], target=math.inf)
    assert [row["workload"] for row in found.rows] == ["a", "a", "b", "b"]
    assert found.scores["seconds"] == {"ddp": pytest.approx(1.0), "diloco": pytest.approx(1.0)}  # all are there at once
    text = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    text.print(found.table())
    assert "AlgoPerf scores" in text.export_text()


def test_who_diverges_takes_for_ever_and_the_others_go_on() -> None:
    found = compare(workload(), ["diloco"], vary=["inner.lr=0.1,1e30"])
    fine, wild = found.rows
    assert math.isfinite(fine["final"]["mean"])
    assert math.isnan(wild["final"]["mean"])
    assert "the loss of local step" in wild["diverged"][0]
    assert set(wild["to_target"].values()) == {math.inf}
    assert found.scores["seconds"]["diloco lr=1e30"] == 0.0
    document = found.to_fields()
    assert document["rows"][1]["final"]["mean"] is None


@pytest.mark.parametrize("seeds", [0, [], [1, 1], [-1]])
def test_seeds_that_are_none_are_refused(seeds: int | list[int]) -> None:
    with pytest.raises(ConfigError, match="--seeds"):
        compare(workload(), ["ddp"], seeds=seeds)
