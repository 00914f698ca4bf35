"""The run file and the program of docs/compare.md; `tests/docs` runs its commands."""

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
step_time_s = 0.05
"""


def test_the_table_of_a_run_file_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table = next(block for block in BLOCKS if "[compare.often]" in block)
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(SMALL + "\n".join(line[4:] for line in table.splitlines()))
    monkeypatch.setattr(sys, "argv", shlex.split("decentral compare run.toml --rules ddp,often"))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert "often" in capsys.readouterr().out


def test_the_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    program = next(block for block in BLOCKS if "import compare" in block or "import read_run" in block)
    start = PAGE.index(program)
    exec("\n".join(line[4:] for line in PAGE[start : PAGE.index("`found.table()`")].splitlines()), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ddp", "diloco"]


def test_the_page_names_every_figure_of_a_row() -> None:
    assert all(f"`rows[].{name}`" in PAGE or f"`.{name}`" in PAGE for name in FIGURES)
