"""Run files: what they accept, what they refuse, and with which words."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import pytest

from decentral.config import Run, read_run, validated, write_run
from decentral.errors import ConfigError, TaskError
from decentral.protocols import DDP, RULES, DiLoCo, Every, Gossip, Int8, Nesterov, NoLoCo, Ring


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_run(write(folder, text), overrides)
    return str(caught.value)


def test_a_run_file_says_the_same_as_python(tmp_path: Path) -> None:
    text = """
    steps = 40
    task = {name = "quadratic", dimension = 4}
    [rule]
    name = "diloco"
    period = 10
    outer = {name = "nesterov", lr = 0.4}
    codec = {name = "int8", block = 64}
    [[fleet.workers]]
    count = 3
    speed = 0.5
    """
    run = read_run(write(tmp_path, text))
    assert run.rule == DiLoCo(period=Every(period=10), outer=Nesterov(lr=0.4), codec=Int8(block=64))
    assert [group.speed for group in run.fleet.each()] == [0.5] * 3
    assert run.make_task().to_table()["dimension"] == 4


def test_a_part_can_be_named_without_fields(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, 'rule = {name = "gossip", topology = "ring", codec = "int8"}'))
    assert run.rule == Gossip(topology=Ring(), codec=Int8())


@pytest.mark.parametrize("name", RULES)
def test_a_written_run_file_reproduces_the_run(tmp_path: Path, name: str) -> None:
    run = Run(task={"name": "quadratic", "dimension": 3}).with_rule(name)
    write_run(run, tmp_path / "run.toml")
    assert read_run(tmp_path / "run.toml") == run


def test_a_written_run_file_says_which_versions_wrote_it(tmp_path: Path) -> None:
    write_run(Run(), tmp_path / "run.toml")
    first = (tmp_path / "run.toml").read_text().partition("\n")[0]
    assert first == f"# Python {platform.python_version()}, decentral {version('decentral')}, torch {version('torch')}"


def test_overrides_reach_every_depth(tmp_path: Path) -> None:
    path = write(tmp_path, 'rule = "diloco"')
    run = read_run(path, ["rule.period=7", "rule.outer.name=sgd", "rule.outer.lr=1.0", "fleet.latency_s=0.5", "seed=3"])
    assert isinstance(run.rule, DiLoCo)
    assert (run.rule.period, run.rule.outer.lr, run.fleet.latency_s, run.seed) == (Every(period=7), 1.0, 0.5, 3)


def test_other_rules_take_over_what_they_share() -> None:
    run = Run(rule=DiLoCo(period=Every(period=20), codec=Int8()), compare={"noloco": {"alpha": 0.25}})
    noloco = run.with_rule("noloco").rule
    assert noloco == NoLoCo(period=Every(period=20), codec=Int8(), alpha=0.25)
    assert run.with_rule("ddp").rule == DDP(codec=Int8())
    assert run.with_rule("diloco").rule == run.rule


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["run.toml", "empty"]),
        ("steps = ", ["run.toml", "not valid TOML"]),
        ('rule = "dilco"', ["rule", "unknown rule 'dilco'", "diloco"]),
        ('rule = "nowhere:Rule"', ["rule: module 'nowhere' was not found"]),
        ('rule = "json:JSONDecoder"', ["rule", "is not a SyncRule"]),
        ('rule = {name = "diloco", period = 0}', ["rule.period: must be at least 1 local step, not 0"]),
        ('rule = {name = "diloco", perid = 5}', ["rule", "unknown field 'perid'", "did you mean 'period'"]),
        ('rule = {name = "diloco", codec = "int9"}', ["rule.codec", "unknown codec 'int9'", "int8"]),
        ('rule = {name = "diloco", codec = {name = "int8", block = 0}}', ["rule.codec.block"]),
        ('rule = {name = "diloco", outer = {name = "nesterov", momentum = 1.5}}', ["rule.outer.momentum"]),
        ("fleet = {up_bps = -1e6}", ["fleet.up_bps", "greater than 0", "-1000000"]),
        ("fleet = {latency_s = -0.1}", ["fleet.latency_s"]),
        ("fleet = {workers = []}", ["fleet.workers", "empty"]),
        ("fleet = {workers = [{speed = 1.5}]}", ["fleet.workers.0.speed", "less than or equal to 1"]),
        ("fleet = {events = [{at_s = 1.0, worker = 9}]}", ["fleet.events.0.worker", "9", "0 to 3"]),
        ("stpes = 5", ["unknown field 'stpes'", "did you mean 'steps'"]),
        ('steps = "many"', ["steps", "valid integer", '"many"']),
        ("inner = {name = 'sgd', lr = 0.1, nesterov = true}", ["inner", "momentum"]),
        ("steps = 10\ninner = {name = 'adamw', warmup_steps = 50}", ["warmup_steps", "50", "10"]),
        ('rule = {name = "noloco", alpha = 0.9, gamma = 0.9}', ["rule.gamma", "0.9", "must be in (0, "]),
        ('rule = "noloco"\nfleet = {workers = [{}]}', ["'noloco' needs at least 2 workers", "1"]),
        ('rule = "gossip"\nfleet = {workers = [{}]}', ["'gossip' needs at least 2 workers"]),
        ('rule = "single_merge"\nfleet = {workers = [{}]}', ["'single_merge' needs at least 2 workers"]),
        ('task = {name = "quadratic", dimension = 0}', ["task.dimension"]),
        ("task = {dimension = 1}", ["task.name", "missing"]),
        ("real = {port = 70000}", ["real.port", "65535"]),
    ],
)
def test_a_refusal_names_the_field_and_what_is_allowed(tmp_path: Path, text: str, words: list[str]) -> None:
    message = refusal(tmp_path, text)
    for word in words:
        assert word in message


def test_every_wrong_field_is_named_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, 'steps = 0\nrule = {name = "diloco", period = 0, codec = "x"}')
    assert all(field in message for field in ("steps:", "rule.period:", "rule.codec:"))


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml: cannot read the run file: No such file"):
        read_run(tmp_path / "nothing.toml")


@pytest.mark.parametrize("override", ["rule.period", "=3", "steps.x=1"])
def test_a_bad_override_is_quoted(tmp_path: Path, override: str) -> None:
    assert f"--set {override}" in refusal(tmp_path, "steps = 4", override)


def test_an_unknown_task_is_refused_when_the_file_is_read() -> None:
    with pytest.raises(TaskError, match="quadratic"):
        read_run(None, task="no_such_task")


def test_one_worker_is_enough_for_rules_with_a_server_side() -> None:
    assert validated({"rule": "diloco", "fleet": {"workers": [{}]}}, "run").fleet.size == 1


@pytest.mark.parametrize(("steps", "warmup"), [(10, 10), (20, 20), (300, 20)])
def test_the_inner_optimiser_nobody_named_warms_up_no_longer_than_the_run(steps: int, warmup: int) -> None:
    run = read_run(None, [f"steps={steps}"])
    assert run.inner.warmup_steps == warmup
    run.inner.check(run.steps)


def test_a_bad_number_of_steps_is_all_that_is_said() -> None:
    with pytest.raises(ConfigError) as caught:
        read_run(None, ["steps=0"])
    assert str(caught.value) == "run: steps: Input should be greater than or equal to 1 (got 0)"
