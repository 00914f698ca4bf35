"""Every example and every snippet of the README that can run, runs."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import pytest

from decentral import read_run, simulate
from decentral.config import tomllib, validated, write_run

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the examples are no part of the package

from examples.spot_weekend import pictures, runs  # noqa: E402
from examples.stage_loss import harsher, paper  # noqa: E402
from examples.stage_loss import kept as stage_kept  # noqa: E402
from examples.stage_loss import pictures as stage_pictures  # noqa: E402
from examples.stage_loss import runs as stage_runs  # noqa: E402
from examples.stage_loss.losses import OneAtATime  # noqa: E402
from examples.stage_loss.replay import replayed  # noqa: E402


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


def test_own_rule_pulls_to_the_average() -> None:
    run = read_run(Path("examples/own_rule/run.toml"))
    outcome = simulate(run)
    assert run.rule.spelling() == "examples.own_rule.pulled_average:PulledAverage"
    assert outcome.after["loss"] < 0.6 * outcome.before["loss"]
    first, *others = outcome.params.values()
    assert all(other.equal(first) for other in others)


def test_own_rule_takes_a_codec_by_name_and_its_complete_file_is_the_same_run(tmp_path: Path) -> None:
    run = read_run(Path("examples/own_rule/run.toml"), ["rule.codec=float32"])
    assert run.rule.to_table()["codec"] == {"name": "float32"}
    write_run(run, tmp_path / "run.toml")
    assert read_run(tmp_path / "run.toml") == run


def test_own_model_learns_to_add() -> None:
    overrides = ["steps=200", "rule.period=20", "task.width=16"]
    run = read_run(None, overrides, task="examples.own_model.digits:make_task")
    outcome = simulate(run)
    assert outcome.after["loss"] < 0.1 * outcome.before["loss"]


def test_spot_weekend_counts_what_it_takes_to_a_loss_with_and_without_churn(tmp_path: Path) -> None:
    overrides = ["steps=12", "rule.period=2", "task.width=8", "task.eval_windows=32", "inner.warmup_steps=0"]
    overrides += ["evaluate_every=2", "fleet.churn.speed_up=40"]
    churning = read_run(runs.RUN_FILE, overrides)
    groups = tuple(group.model_copy(update={"count": 2}) for group in churning.fleet.workers)
    churning = churning.model_copy(update={"fleet": churning.fleet.model_copy(update={"workers": groups})})
    quiet = runs.without_churn(churning)
    results = []
    for name in runs.RULES:
        to_the_end = runs.measure(name, False, quiet.with_rule(name), target=0.0)
        on_the_way = to_the_end.curve[len(to_the_end.curve) // 2]
        stopped = runs.measure(name, False, quiet.with_rule(name), target=on_the_way[2])
        assert not to_the_end.reached
        assert stopped.reached
        assert stopped.curve[-1][2] == on_the_way[2]
        assert (stopped.hours, stopped.lost, to_the_end.lost) == (pytest.approx(on_the_way[0]), 0.0, 0.0)
        assert 0 < stopped.dollars < to_the_end.dollars
        assert stopped.machine_dollars == pytest.approx(6 * 0.918 * stopped.hours)
        results += [to_the_end, runs.measure(name, True, churning.with_rule(name), target=0.0)]
    assert results[1].machine_dollars < 6 * 0.918 * results[1].hours, "nobody was taken away"
    results.append(runs.measure(runs.ALONE, False, runs.alone(quiet).model_copy(update={"steps": 12}), target=0.0))
    assert (results[-1].egress_dollars, results[-1].nbytes, results[-1].lost) == (0.0, 0, 0.0)
    assert pictures.results_table(results, 0.0).row_count == len(results)
    pictures.plot_curves(results, 0.0, tmp_path / "loss.png")
    pictures.plot_costs(results, tmp_path / "costs.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "costs.png"))


@pytest.mark.parametrize(("chance", "every"), [(0.03, 20), (0.2, 7)])
def test_stage_loss_goes_back_to_checkpoints_as_often_as_probability_says(chance: float, every: int) -> None:
    """(1 - q) (1 - (1 - q)^C) / q of C iterations count."""
    windows, generator = 10_000, np.random.default_rng(0)
    lost_at_s = iter((np.flatnonzero(generator.random(windows * every) < chance) + 0.5).tolist())
    counted = [count for _, count, _ in islice(replayed(lost_at_s, 1.0, every, 0.0), windows * every)]
    gains = np.diff([0, *counted[every - 1 :: every]])
    expected = (1 - chance) * (1 - (1 - chance) ** every) / chance
    assert gains.mean() == pytest.approx(expected, abs=4 * gains.std() / math.sqrt(windows))


def test_stage_loss_replays_a_linear_curve() -> None:
    """Losses in iterations 3 and 6 of 10 s each, checkpoints after every fourth, restarts of 5 s."""
    found = list(islice(replayed(iter([25.0, 62.0]), 10.0, 4, 5.0), 8))
    assert found == [
        *((10.0, 1, 0), (20.0, 2, 0), (35.0, 0, 1), (45.0, 1, 1)),
        *((55.0, 2, 1), (70.0, 1, 2), (80.0, 2, 2), (90.0, 3, 2)),
    ]
    curve = tuple((hours, round(100 * hours), 5.0 - 2 * hours) for hours in (0.0, 0.5, 1.0))
    quiet = stage_runs.Result(stage_runs.NO_LOSSES, 0.0, 0, True, 1.0, 100, 0, curve)
    churn = OneAtATime(per_hour=0.5, speed_up=5, stages=6, spared=(0, 5))
    result = stage_runs.with_checkpoints(quiet, 0.5, churn, 6)
    assert all(loss == pytest.approx(5.0 - 0.02 * count) for _, count, loss in result.curve)
    assert result.curve[-1][1:] == (100, pytest.approx(3.0))
    assert result.losses > 0
    assert result.hours == pytest.approx(0.01 * result.iterations + churn.restart_s * result.losses / 3600)


def test_stage_loss_loses_one_stage_at_a_time_and_as_many_as_the_rate_says() -> None:
    hours, alone = 20_000, OneAtATime(per_hour=0.16, speed_up=5, apart_s=1, stages=2, spared=(0,), restart_s=30)
    times = [event.at_s for event in takewhile(lambda event: event.at_s < 3600 * hours, alone.events([None] * 2, 0))]
    lost, mean_h = len(times[::2]), -1 / (5 * math.log(1 - 0.16)) + 30 / 3600
    assert lost == pytest.approx(hours / mean_h, abs=4 * math.sqrt(hours / mean_h))
    crowd = OneAtATime(per_hour=0.9, speed_up=5, stages=6, spared=(0,))
    events = list(islice(crowd.events([None] * 6, 0), 2000))
    for gone, back, later in zip(events[::2], events[1::2], events[2::2], strict=False):
        assert (gone.kind, back.kind, back.worker) == ("preempt", "join", gone.worker)
        assert back.at_s == pytest.approx(gone.at_s + crowd.restart_s)
        assert later.at_s >= gone.at_s + crowd.apart_s
    assert {event.worker for event in events} == {1, 2, 3, 4, 5}


def test_stage_loss_recovers_each_way_and_compares_them(tmp_path: Path) -> None:
    overrides = ["steps=8", "batch_size=2", "rule.period=2", "evaluate_every=2", "inner.warmup_steps=0"]
    overrides += ["pipeline.microbatches=2", "pipeline.cuts=[2, 3, 4, 5, 6]", "task.depth=6", "task.width=8"]
    overrides += ["task.context=8", "task.eval_windows=8", "sim.processes=1", "fleet.churn.speed_up=60"]
    run = read_run(stage_runs.RUN_FILE, overrides)

    def measured(way: str, rate: float, target: float = 0.0) -> stage_runs.Result:
        return stage_runs.measure(way, rate, stage_runs.recovering(run, way, rate), target)

    quiet = measured(stage_runs.NO_LOSSES, 0.0)
    results = {way: measured(way, 0.16) for way in (stage_runs.COPIES, stage_runs.ALL_SIX, "from_start")}
    results["checkfree"] = measured("checkfree", 0.05)  # to which hours are compared
    assert all(result.losses and not result.reached for result in results.values())
    copies = results[stage_runs.COPIES]
    undisturbed = {step: (hours, loss) for hours, step, loss in quiet.curve}
    for hours, step, loss in copies.curve[1:]:
        assert loss == pytest.approx(undisturbed[step][1], rel=1e-5), "but for rounding, nothing is lost"
        assert hours > undisturbed[step][0]
    middle = quiet.curve[3]
    stopped = measured(stage_runs.NO_LOSSES, 0.0, target=middle[2])
    assert (stopped.reached, stopped.curve[-1]) == (True, middle)
    shown = [*results.values(), stopped, *stage_runs.replays(stopped)]
    computed = next(result for result in shown if result.way == stage_runs.COMPUTATION)
    assert computed.hours == pytest.approx(151.04 / 91.35 * stopped.hours)
    assert stage_pictures.results_table(shown, middle[2]).row_count == len(shown)
    stage_pictures.plot_curves(shown, middle[2], tmp_path / "loss.png")
    stage_pictures.plot_hours(shown, tmp_path / "hours.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "hours.png"))


def test_stage_loss_keeps_results_and_does_not_run_them_again(tmp_path: Path) -> None:
    overrides = ["steps=4", "batch_size=2", "rule.period=2", "evaluate_every=2", "inner.warmup_steps=0"]
    overrides += ["pipeline.microbatches=2", "pipeline.cuts=[2, 3, 4, 5, 6]", "task.depth=6", "task.width=8"]
    overrides += ["task.context=8", "task.eval_windows=8"]
    run = stage_runs.run_of(0, overrides)
    job = (stage_runs.NO_LOSSES, 0.0, stage_runs.recovering(run, stage_runs.NO_LOSSES, 0.0))
    found = stage_kept.result(job, 0.0, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace('"iterations": 4', '"iterations": 5'))
    assert stage_kept.result(job, 0.0, tmp_path) == dataclasses.replace(found, iterations=5)
    assert stage_kept.result(job, 9.0, tmp_path).iterations == 0, "another target is another result"


def test_stage_loss_has_as_many_losses_as_the_paper_where_they_are_harsher() -> None:
    """The paper's iterations, by its hours: 14,500, 16,000 and 22,000, where redundant computation takes 10,000."""
    relative = [paper.relative_iterations("checkfree", rate) for rate in stage_runs.RATES]
    assert relative == [pytest.approx(each, rel=1e-3) for each in (1.45, 1.60, 2.20)]
    churn = stage_runs.churn_of(stage_runs.run_of(0, harsher.CLOCK))
    ours_h = 180 * 92.5 / 3600  # iterations without losses, and what each takes
    lost = 1 - (1 - 0.05) ** (churn.speed_up * ours_h)  # of a stage, on the way to the target
    assert -4 * math.log1p(-lost) == pytest.approx(paper.losses("checkfree", 0.05, 4), rel=0.01)
    results = [stage_runs.Result("checkfree", rate, 0, True, 9.0, 290, 80, ()) for rate in stage_runs.RATES]
    results.append(stage_runs.Result(stage_runs.NO_LOSSES, 0.0, 0, True, 4.6, 180, 0, ()))
    assert harsher.iterations_table(results).row_count == 4
    assert {way for way, _, _ in harsher.runs(0)} == set(harsher.RATES_OF)


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*/*.toml")), ids=lambda path: path.parent.name)
def test_every_run_file_is_accepted_and_can_be_timed(path: Path) -> None:
    run = read_run(path, ["steps=60"])
    run = run.model_copy(update={"fleet": run.fleet.model_copy(update={"churn": None})})  # or not all would finish
    outcome = simulate(run, timing_only=True)
    assert [left.reason for left in outcome.left()] == ["finished"] * run.fleet.size


def test_the_readmes_run_file_is_accepted() -> None:
    text = (ROOT / "README.md").read_text()
    block = next(part for part in re.findall(r"(?:^    .*\n|^\n)+", text, re.M) if "[[fleet.workers]]" in part)
    table = tomllib.loads("\n".join(line[4:] for line in block.splitlines()))
    assert validated(table, "README").fleet.size == 3


def test_the_readmes_rule_is_the_examples_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text()
    block = next(part for part in re.findall(r"(?:^    .*\n|^\n)+", text, re.M) if "class PulledAverage" in part)
    (tmp_path / "readme_rule.py").write_text("\n".join(line[4:] for line in block.splitlines()))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "readme_rule", raising=False)
    overrides = ["steps=40", "inner.warmup_steps=0", "rule.name=readme_rule:PulledAverage", "rule.pull=0.5"]
    run = read_run(None, overrides, task="quadratic")
    theirs = simulate(run).merged()
    ours = simulate(
        read_run(
            None,
            [*overrides[:2], "rule.name=examples.own_rule.pulled_average:PulledAverage", "rule.pull=0.5"],
            task="quadratic",
        )
    ).merged()
    assert theirs.equal(ours)
