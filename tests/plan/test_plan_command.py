"""`decentral plan` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Command, command_line

from decentral.config import read_run
from decentral.sim.simulate import simulate

FLEET = """
[fleet]
up_bps = 1e9
down_bps = 1e9
latency_s = 0.01
[[fleet.workers]]
count = 2
device = "A100-80"
dtype = "bfloat16"
mfu = 0.4
billing = "on_demand"
"""
MODEL = ("--params", "1e8", "--context", "1024", "--tokens", "2e9")


@pytest.fixture
def decentral(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run `decentral plan` in a folder with `fleet.toml`; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    Path("fleet.toml").write_text(FLEET, encoding="utf-8")
    return command_line(monkeypatch, capsys, "plan")


def test_a_plan_is_a_table_and_a_run_file(decentral: Command) -> None:
    status, out, _ = decentral("fleet.toml", *MODEL, "--write", "run.toml")
    assert status == 0
    for words in ("samples: assumed equal", "what would change the answer", "4 x the bandwidth", "run file: run.toml"):
        assert words in out
    run = read_run(Path("run.toml"))
    assert run.steps * run.fleet.size * run.batch_size * 1024 == pytest.approx(2e9, rel=1e-3)
    few = run.model_copy(update={"steps": 40})
    assert simulate(few, timing_only=True).samples() == 40 * run.fleet.size * run.batch_size


def test_the_figures_as_json(decentral: Command) -> None:
    status, out, _ = decentral("fleet.toml", *MODEL, "--json", "--for", "cost", "--slack", "0.1")
    assert status == 0
    told = json.loads(out)
    assert told["version"] == 1
    assert (told["goal"], told["slack"]) == ("cost", 0.1)
    first = told["first"]
    # 6 x parameters x tokens, at 40 % of 312e12 FLOP/s, at list price; rounds of one worker are votes alone
    assert first["workers"] == 1
    assert first["hours"] == pytest.approx(6 * 1e8 * 2e9 / (0.4 * 312e12) / 3600, rel=2e-3)
    assert first["dollars"] == pytest.approx(first["hours"] * 1.39)
    assert first["computing"] == pytest.approx(1, abs=2e-3)
    assert first in told["options"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.toml", *MODEL), "missing.toml: cannot read the run file"),
        (("bare.toml", *MODEL), r"plan: the file has no [fleet]"),
        (("apart.toml", *MODEL), "fleet.network: no link between 'lab' and 'cellar'"),
        (("events.toml", *MODEL), "fleet.events: a plan takes a fleet as it stays, and churn; leave it out"),
        (("fleet.toml", "--params", "-1", "--tokens", "1e9"), "--params -1: give the number of the model's parameters"),
        (("fleet.toml", "--params", "1e8", "--tokens", "1e9"), "--tokens: give --context too"),
        (("fleet.toml", "--params", "1e8", "--samples", "9"), "device: the step time of A100-80 cannot"),
        (("fleet.toml", *MODEL, "--samples", "10"), "--samples and --tokens both say how much is trained"),
        (("fleet.toml", *MODEL[:4]), "plan: nobody says how much is trained"),
        (("fleet.toml", *MODEL[:4], "--tokens", "0"), "plan: there are 0 samples to train on"),
        (("fleet.toml", "--context", "8"), "--context: the task says it"),
        (("fleet.toml", *MODEL, "--task", "quadratic"), "--params and --task both say what is trained"),
        (("fleet.toml", *MODEL, "--for", "fun"), "--for fun: choose one of time, cost"),
        (("fleet.toml", *MODEL, "--slack", "-0.01"), "--slack -0.01: give a share, such as 0.05 for 5 %, or 0"),
        (("fleet.toml", *MODEL, "--hours", "0.1"), "plan: nothing keeps --hours 0.1: the quickest way takes"),
        (("timed.toml", "--task", "quadratic", "--tokens", "9"), "--tokens: samples of the task 'quadratic' are no"),
        (("staged.toml", *MODEL), "pipeline.stages: a plan is for whole models"),
    ],
)
def test_bad_input_is_one_clear_message(decentral: Command, arguments: tuple[str, ...], message: str) -> None:
    sites = (
        '[[fleet.workers]]\nstep_time_s = 1.0\nsite = "lab"\n[[fleet.workers]]\nstep_time_s = 1.0\nsite = "cellar"\n'
    )
    files = {
        "bare": "steps = 100\n",
        "apart": sites,
        "events": '[fleet]\nevents = [{at_s = 5, kind = "crash", worker = 0}]\n',
        "timed": "[fleet]\nstep_time_s = 1.0\n",
        "staged": FLEET.replace("count = 2", "count = 4") + "[pipeline]\nstages = 2\n",
    }
    for name, text in files.items():
        Path(f"{name}.toml").write_text(text, encoding="utf-8")
    status, _, err = decentral(*arguments)
    assert status == 2
    assert err.startswith("decentral: ")
    assert message in err
    assert "Traceback" not in err
