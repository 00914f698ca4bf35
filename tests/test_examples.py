"""Every example and every snippet of the README that can run, runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from decentral import read_run, simulate
from decentral.config import tomllib, validated

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the examples are no part of the package

from examples.spot_weekend import pictures, runs  # noqa: E402


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
