"""The command line as a user meets it: what it leaves behind, what it says, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Command, command_line
from safetensors.torch import load_file

from decentral.config import read_run, tomllib
from decentral.journal import Left, read_journal

QUICK = ("--task", "quadratic", "--set", "steps=12", "--set", "rule.period=4", "--set", "inner.warmup_steps=0")

USER_TASKS = """
import torch
from decentral.task import Task
from decentral.tasks import Quadratic

class Linear(Task):
    slope: float = 2.0
    def model(self): return torch.nn.Linear(1, 1)
    def batch(self, worker, start, size):
        x = torch.arange(start, start + size, dtype=torch.float32).remainder(7).unsqueeze(1)
        return {"x": x, "y": self.slope * x}
    def loss(self, model, batch): return ((model(batch["x"]) - batch["y"]) ** 2).mean()
    def evaluate(self, model): return {"loss": float(self.loss(model, self.batch(0, 0, 7)))}

def make_linear(): return Linear(slope=3.0)

class Raises(Quadratic):
    def batch(self, worker, start, size):
        if start >= 24: raise RuntimeError("disk on fire")
        return super().batch(worker, start, size)

class NotANumber(Quadratic):
    def loss(self, model, batch): return super().loss(model, batch) * float("nan")

class NoLoss(Quadratic):
    def evaluate(self, model): return {"accuracy": 1.0}
"""


@pytest.fixture
def decentral(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run the command in an empty folder of its own; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cli_user_tasks", raising=False)
    return command_line(monkeypatch, capsys)


def test_a_run_leaves_a_complete_folder(decentral: Command, tmp_path: Path) -> None:
    status, out, _ = decentral("simulate", *QUICK, "--out", "first")
    assert status == 0
    assert "held-out loss" in out
    folder = tmp_path / "first"
    assert sorted(path.name for path in folder.iterdir()) == [
        "journal.jsonl",
        "model.safetensors",
        "run.toml",
        "summary.json",
    ]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert summary["samples"] == 4 * 12 * 8
    assert len([record for record in read_journal(folder / "journal.jsonl") if isinstance(record, Left)]) == 4
    model = read_run(folder / "run.toml").make_task().model()
    model.load_state_dict(load_file(folder / "model.safetensors"))


def test_the_run_file_left_behind_reproduces_the_run(decentral: Command, tmp_path: Path) -> None:
    decentral("simulate", *QUICK, "--set", "seed=5", "--out", "first")
    status, _, _ = decentral("simulate", "first/run.toml", "--out", "second")
    assert status == 0
    for name in ("journal.jsonl", "model.safetensors", "run.toml", "summary.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_json_is_all_that_stdout_gets(decentral: Command) -> None:
    status, out, _ = decentral("simulate", *QUICK, "--json")
    assert status == 0
    assert json.loads(out)["headline"] == "loss"


def test_timing_only_leaves_no_checkpoint_and_the_same_times(decentral: Command) -> None:
    ring = (*QUICK, "--set", "rule.all_reduce=ring")  # by messages, and so to the bit: see docs/scale.md
    _, trained, _ = decentral("simulate", *ring, "--json", "--out", "trained")
    _, timed, _ = decentral("simulate", *ring, "--json", "--timing-only", "--out", "timed")
    assert json.loads(trained)["workers"] == json.loads(timed)["workers"]
    assert not Path("timed/model.safetensors").exists()


def test_a_timeline_can_be_written_with_the_run_or_after_it(decentral: Command, tmp_path: Path) -> None:
    assert decentral("simulate", *QUICK, "--out", "first", "--timeline", "with.json", "--verify")[0] == 0
    status, out, _ = decentral("timeline", "first")
    assert status == 0
    assert "first/timeline.json; open it at ui.perfetto.dev" in out
    assert (tmp_path / "with.json").read_bytes() == (tmp_path / "first" / "timeline.json").read_bytes()
    assert decentral("timeline", "first", "--out", "after.json")[0] == 0
    assert (tmp_path / "with.json").read_bytes() == (tmp_path / "after.json").read_bytes()


def test_a_run_can_be_looked_at_in_its_folder(decentral: Command, tmp_path: Path) -> None:
    assert decentral("simulate", *QUICK, "--out", "first", "--tensorboard")[0] == 0
    status, out, _ = decentral("status", "first", "--json")
    found = json.loads(out)
    assert (status, found["over"], found["departed"]) == (0, True, {str(worker): "finished" for worker in range(4)})
    assert [(worker["step"], worker["samples"]) for worker in found["workers"]] == [(12, 12 * 8)] * 4
    status, out, _ = decentral("watch", "first")
    assert status == 0
    assert "first, 0:0" in out
    assert {path.name for path in (tmp_path / "first" / "tensorboard").iterdir()} >= {f"worker-{i}" for i in range(4)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("timeline", "nowhere"), "nowhere: there is no journal.jsonl in this folder; name the folder of a run"),
        (("simulate", *QUICK, "--timeline", "no/such/folder.json"), "no/such/folder.json: cannot write the timeline"),
    ],
)
def test_a_timeline_that_cannot_be_made_is_refused(decentral: Command, arguments: tuple[str, ...], words: str) -> None:
    status, _, err = decentral(*arguments)
    assert status == 2
    assert words in " ".join(err.split())


@pytest.mark.parametrize("timing", [(), ("--timing-only",)])
def test_a_fleet_that_dies_out_says_who_went_last_and_why(
    decentral: Command, tmp_path: Path, timing: tuple[str, ...]
) -> None:
    events = "fleet.events=[{at_s=0.21,worker=1},{at_s=0.11,worker=0}]"
    fleet = ("--set", "fleet.workers=[{count=2}]", "--set", events)
    status, _, err = decentral("simulate", *QUICK, *fleet, *timing, "--out", "died")
    message = (
        "fleet: nobody is left at the end. The last of 2 workers, worker 1, went at 0.21 s after 4 of 12 local steps"
    )
    assert status == 2
    assert f"{message}: crashed" in " ".join(err.split())
    assert message in json.loads((tmp_path / "died" / "summary.json").read_text())["stopped"]
    assert (
        len([record for record in read_journal(tmp_path / "died" / "journal.jsonl") if isinstance(record, Left)]) == 2
    )


def test_costs_are_in_the_table_when_prices_are_known_and_in_the_summary(decentral: Command) -> None:
    status, out, _ = decentral("simulate", *QUICK, "--set", "fleet.workers=[{count=2,dollars_per_hour=3600}]")
    assert status == 0
    assert "cost" in out
    assert "…" not in out  # a usual terminal has room for it
    assert "machines $" in out
    _, bare, _ = decentral("simulate", *QUICK)
    assert "cost" not in bare
    assert "$" not in bare
    _, figures, _ = decentral("simulate", *QUICK, "--set", "fleet.workers=[{count=2,dollars_per_hour=3600}]", "--json")
    summary = json.loads(figures)
    assert summary["accounts"]["dollars"] == pytest.approx(2 * summary["seconds"])


def test_compare_runs_every_rule_on_the_same_work(decentral: Command, tmp_path: Path) -> None:
    rules = ["ddp", "local_sgd", "diloco", "noloco", "gossip"]
    status, out, _ = decentral("compare", *QUICK, "--rules", ",".join(rules), "--json", "--out", "cmp")
    rows = json.loads(out)["rows"]
    assert status == 0
    assert [row["rule"] for row in rows] == rules
    assert len({row["samples"] for row in rows}) == 1
    assert len({row["before"][0]["loss"] for row in rows}) == 1
    sent = {row["rule"]: row["bytes_sent_per_worker"] for row in rows}
    assert sent["ddp"] > 2 * sent["local_sgd"]
    assert all((tmp_path / "cmp" / rule / "journal.jsonl").exists() for rule in rules)
    assert (tmp_path / "cmp" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "cmp" / "comparison.json").read_text() == out


def test_compare_prints_a_table(decentral: Command) -> None:
    status, out, _ = decentral("compare", *QUICK, "--rules", "ddp,diloco", "--out", "cmp")
    assert status == 0
    assert "ddp" in out
    assert "virtual time" in out


@pytest.mark.parametrize("task", ["cli_user_tasks:Linear", "cli_user_tasks:make_linear"])
def test_a_users_own_task_is_found_in_the_current_folder(decentral: Command, tmp_path: Path, task: str) -> None:
    (tmp_path / "cli_user_tasks.py").write_text(USER_TASKS)
    status, out, _ = decentral("simulate", "--task", task, *QUICK[2:], "--json")
    assert status == 0
    summary = json.loads(out)
    assert summary["after"]["loss"] < summary["before"]["loss"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "rule=nope"), ["unknown rule 'nope'"]),
        (("--set", "rule.period=0"), ["rule.period: must be at least 1 local step, not 0"]),
        (("--set", "fleet.down_bps=-5"), ["fleet.down_bps", "greater than 0 (got -5)"]),
        (("missing.toml",), ["missing.toml: cannot read the run file"]),
        (("--task", "cli_user_tasks:Missing"), ["cli_user_tasks", "Missing"]),
        (("--task", "cli_user_tasks:Raises"), ["worker 0", "local step 3", "RuntimeError: disk on fire"]),
        (("--task", "cli_user_tasks:NotANumber"), ["worker 0", "local step 0", "nan", "inner.lr"]),
        (("--task", "cli_user_tasks:NoLoss"), ["task.evaluate()", "accuracy", "'loss'"]),
        (("--task", "fashion_mnist", "--set", "task.folder=nowhere"), ["nowhere", "dataset-fashion-mnist"]),
        (("--task", "byte_gpt", "--set", "task.corpus=nowhere"), ["nowhere"]),
    ],
)
def test_bad_input_ends_with_one_message_and_status_2(
    decentral: Command, tmp_path: Path, arguments: tuple[str, ...], words: list[str]
) -> None:
    (tmp_path / "cli_user_tasks.py").write_text(USER_TASKS)
    quick = QUICK if "--task" not in arguments else QUICK[2:]
    status, out, err = decentral("simulate", *quick, *arguments)
    assert status == 2
    assert out.strip() == ""
    assert err.startswith("decentral: ")
    assert "Traceback" not in err
    flat = " ".join(err.split())
    for word in words:
        assert word in flat


@pytest.mark.parametrize(
    "arguments",
    [("--set", "rule.period=0"), ("--task", "fashion_mnist", "--set", "task.folder=nowhere"), ("missing.toml",)],
)
def test_nothing_is_left_behind_by_what_never_began(
    decentral: Command, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    assert decentral("simulate", *arguments)[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_an_empty_run_file_is_refused(decentral: Command, tmp_path: Path) -> None:
    (tmp_path / "run.toml").touch()
    status, _, err = decentral("simulate", "run.toml")
    assert status == 2
    assert "the run file is empty" in err


def test_a_folder_that_holds_a_run_is_not_overwritten(decentral: Command) -> None:
    assert decentral("simulate", *QUICK, "--out", "here")[0] == 0
    before = Path("here/journal.jsonl").read_bytes()
    status, _, err = decentral("simulate", *QUICK, "--set", "seed=9", "--out", "here")
    assert status == 2
    assert "there is a run in this folder already" in err
    assert Path("here/journal.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rules", "ddp,nope"), "unknown rule 'nope'"),
        (("--rules", ""), "name at least one rule"),
        (("--rules", "ddp,ddp"), "ddp named twice"),
        (("--rules", "ddp", "--set", "compare.noloco.alpha=0.1"), "compare.noloco"),
        (("--rules", "fast", "--set", "compare.fast.rule=nope"), "unknown rule 'nope'"),
        (("--equal", "steps"), "--equal steps: choose one of samples, seconds, bytes"),
        (("--seeds", "many"), "--seeds many: give how many, or which"),
        (("--vary", "fleet.up_bps=1,2"), "--vary fleet.up_bps=1,2: expected a field of the rule"),
    ],
)
def test_compare_refuses_before_anything_runs(decentral: Command, arguments: tuple[str, ...], words: str) -> None:
    status, _, err = decentral("compare", *QUICK, *arguments)
    assert status == 2
    assert words in err


def test_the_installed_command_explains_itself() -> None:
    command = Path(sys.executable).with_name("decentral")
    shown = subprocess.run([command, "--help"], capture_output=True, text=True, check=True, timeout=120).stdout
    assert all(use in shown for use in ("train", "simulate", "compare"))


def test_the_written_run_file_spells_out_every_field(decentral: Command) -> None:
    decentral("simulate", *QUICK, "--out", "first")
    table = tomllib.loads(Path("first/run.toml").read_text())
    assert table["rule"]["outer"] == {"name": "nesterov", "lr": 1.0, "momentum": 0.5}
    assert table["rule"]["codec"] == {"name": "int8", "block": 256}
    assert table["inner"]["name"] == "adamw"
    assert table["fleet"]["workers"][1]["speed"] == 0.7
