"""Completion as shells ask for it: by environment variables, of the installed command's entry point."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from decentral import cli

Ask = Callable[..., list[str]]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Ask:
    """Return what bash is told for the words of a line, the last of which is not whole yet."""
    monkeypatch.chdir(tmp_path)

    def asked(*words: str) -> list[str]:
        monkeypatch.setenv("_DECENTRAL_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(("decentral", *words)))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        monkeypatch.setattr(sys, "argv", ["decentral"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        return capsys.readouterr().out.split()

    return asked


def test_commands_and_their_options(ask: Ask) -> None:
    assert ask("sim") == ["simulate"]
    assert {"train", "simulate", "compare", "report"} <= set(ask(""))
    assert ask("simulate", "--timi") == ["--timing-only"]


def test_rules_are_completed_one_after_the_other(ask: Ask) -> None:
    assert ask("compare", "--rules", "nol") == ["noloco"]
    assert ask("compare", "--rules", "ddp,eager") == ["ddp,eager_diloco"]
    assert set(ask("compare", "--rules", "ddp,sp")) == {"ddp,sparse_loco", "ddp,sparta"}


def test_tasks(ask: Ask) -> None:
    assert ask("train", "--task", "qua") == ["quadratic"]


def test_fields_are_those_of_the_run_file_on_the_line(ask: Ask) -> None:
    assert ask("simulate", "--set", "fleet.net")[0] == "fleet.network="
    assert "rule.outer.momentum=" in ask("simulate", "--set", "rule.")
    assert "rule.gamma=" not in ask("simulate", "--set", "rule.")
    Path("run.toml").write_text('rule = "noloco"\n')
    assert "rule.gamma=" in ask("simulate", "run.toml", "--set", "rule.")
    Path("run.toml").write_text('rule = "no such rule"\n')
    assert "rule.outer.momentum=" in ask("simulate", "run.toml", "--set", "rule.")


def test_a_run_file_is_left_to_the_shell(ask: Ask) -> None:
    """Nothing is said, and then bash completes the names of files: `complete -o default`."""
    Path("run.toml").write_text("steps = 3\n")
    assert ask("simulate", "ru") == []


def test_bash_understands_the_script_that_it_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["decentral", "--show-completion", "bash"])
    with pytest.raises(SystemExit):
        cli.main()
    script = capsys.readouterr().out
    shown = subprocess.run(
        ["bash", "-c", f"{script}\ncomplete -p decentral"], capture_output=True, text=True, timeout=60
    )
    assert (shown.stdout, shown.stderr) == ("complete -o default -F _decentral_completion decentral\n", "")
