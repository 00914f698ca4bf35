"""Every command and program of docs/compare.md runs."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from decentral import cli
from decentral.compare.comparison import FIGURES

PAGE = (Path(__file__).parents[2] / "docs" / "compare.md").read_text()
BLOCKS = re.findall(r"(?:^    .*\n)+", PAGE, re.M)
COMMANDS = [
    line.partition("#")[0].strip() for block in BLOCKS for line in block.splitlines() if "decentral compare" in line
]
SMALL = """
steps = 6
evaluate_every = 2
batch_size = 2
[task]
name = "byte_gpt"
width = 8
depth = 1
heads = 1
context = 8
[rule]
name = "diloco"
period = 2
[inner]
name = "adamw"
[fleet]
up_bps = {up_bps}
step_time_s = 0.05
"""


@pytest.fixture
def _run_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, up_bps in (("run", 1e7), ("lan", 1e9), ("wan", 1e6)):
        Path(f"{name}.toml").write_text(SMALL.format(up_bps=up_bps))


def shown_by(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what the command prints; it must end well."""
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("_run_files")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "pictures and figures:" in shown_by(command, monkeypatch, capsys)


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) == 9


@pytest.mark.usefixtures("_run_files")
def test_the_table_of_a_run_file_is_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    table = next(block for block in BLOCKS if "[compare.often]" in block)
    text = "\n".join(line[4:] for line in table.splitlines())
    Path("run.toml").write_text(Path("run.toml").read_text() + text)
    assert "often" in shown_by("decentral compare run.toml --rules ddp,often", monkeypatch, capsys)


def test_the_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    program = next(block for block in BLOCKS if "import compare" in block or "import read_run" in block)
    start = PAGE.index(program)
    exec("\n".join(line[4:] for line in PAGE[start : PAGE.index("`found.table()`")].splitlines()), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ddp", "diloco"]


def test_the_page_names_every_figure_of_a_row() -> None:
    assert all(f"`rows[].{name}`" in PAGE or f"`.{name}`" in PAGE for name in FIGURES)
