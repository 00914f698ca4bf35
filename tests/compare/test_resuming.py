"""A comparison that is stopped in the middle, and the same one called again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from decentral.compare import compare
from decentral.compare.one import is_complete
from decentral.config import Run
from decentral.errors import ConfigError

RUN = {
    "steps": 60,
    "task": {"name": "quadratic"},
    "rule": {"name": "diloco", "period": 4},
    "inner": {"name": "sgd", "lr": 0.1},
    "sim": {"processes": 1},
}
PROGRAM = """
import sys
from pathlib import Path
from decentral.compare import compare
from decentral.config import Run
compare(Run(**{run}), ["ddp", "diloco"], seeds=3, folder=Path(sys.argv[1]), tell=lambda words: print(words, flush=True))
"""


@pytest.fixture(scope="module")
def uninterrupted() -> list[list[float]]:
    """What both rules come to with each seed."""
    found = compare(Run(**RUN), ["ddp", "diloco"], seeds=3)  # type: ignore[arg-type]
    return [row["finals"] for row in found.rows]


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGINT])
def test_what_is_complete_is_not_done_again(
    tmp_path: Path, ended_by: signal.Signals, uninterrupted: list[list[float]]
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", PROGRAM.format(run=RUN), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("run 4 of 6") and line.rstrip().endswith(" 3 virtual seconds"):
                break
        process.send_signal(ended_by)
        process.wait(timeout=60)
    assert process.returncode != 0
    complete = {path: path.stat().st_mtime_ns for path in out.glob("*/*/summary.json")}
    assert len(complete) == 3
    begun = [path.name for path in out.glob("*/*.part")]
    assert begun == ["seed-1.part"]

    told: list[str] = []
    found = compare(Run(**RUN), ["ddp", "diloco"], seeds=3, folder=out, tell=told.append)  # type: ignore[arg-type]
    assert len({line.partition(":")[0] for line in told}) == 3
    assert told[0].startswith("run 1 of 3, diloco, seed 1")
    assert {path: path.stat().st_mtime_ns for path in complete} == complete
    assert not list(out.glob("*/*.part"))
    assert [row["finals"] for row in found.rows] == uninterrupted


def test_another_target_needs_no_runs_and_another_plan_is_refused(tmp_path: Path) -> None:
    run, out, told = Run(**{**RUN, "steps": 8}), tmp_path / "out", list[str]()  # type: ignore[arg-type]
    compare(run, ["ddp", "diloco"], folder=out)
    again = compare(run, ["ddp", "diloco"], folder=out, target=3.0, tell=told.append)
    assert told == []
    assert again.targets == {"run": 3.0}
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"another comparison .* workloads.run.ddp.steps: 8 there, 9 here"):
        compare(run.model_copy(update={"steps": 9}), ["ddp", "diloco"], folder=out)
    with pytest.raises(ConfigError, match=r"workloads.run.noloco: here, not there"):
        compare(run, ["ddp", "diloco", "noloco"], folder=out)
    with pytest.raises(ConfigError, match="equal: samples there, seconds here"):
        compare(run, ["ddp", "diloco"], equal="seconds", folder=out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="holds something else than a comparison"):
        compare(Run(**RUN), ["ddp"], folder=tmp_path)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_torn_summary_and_one_that_is_gone_say_which_folder_to_remove(tmp_path: Path) -> None:
    run = Run(**{**RUN, "steps": 4})  # type: ignore[arg-type]
    compare(run, ["ddp"], folder=tmp_path / "out")
    summary = tmp_path / "out" / "ddp" / "summary.json"
    assert is_complete(summary.parent)
    summary.write_text(json.dumps({})[:1])
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"ddp/summary.json: cannot be read .* remove its folder"):
            compare(run, ["ddp"], folder=tmp_path / "out")
        summary.unlink(missing_ok=True)
