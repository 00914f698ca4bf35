"""Every example and every snippet of the README that can run, runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from decentral import read_run, simulate
from decentral.config import tomllib, validated

ROOT = Path(__file__).parent.parent


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


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*/*.toml")), ids=lambda path: path.parent.name)
def test_every_run_file_is_accepted_and_can_be_timed(path: Path) -> None:
    run = read_run(path, ["steps=60"])
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
