"""Every command that README and docs tell people to type runs, or is read by the program that it is for.

A command is run in a folder of its own, shortened by more options where there are any that do. Those of `ELSEWHERE` are
not run here; a mistyped option, module, target or path in them fails nevertheless. Commands of programs that are not
ours are only looked through for paths that do not exist.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from documented import FOREIGN, OURS, PAGES, ROOT, Command, all_commands
from elsewhere import ELSEWHERE

from decentral import cli
from decentral.config import tomllib

COMMANDS = all_commands()
KNOWN: Any = typer.main.get_command(cli.app)
SHORTER = ("steps=4", "batch_size=2", "evaluate_every=2", "inner.warmup_steps=0", "fleet.step_time_s=1.0")
SMALLER = ("task.name=quadratic", "sim.processes=1")
"""What makes a run a matter of a tenth of a second."""
OPTIONS_THAT_WRITE = ("--out", "--timeline", "--write", "--figures")


def elsewhere(command: Command) -> str | None:
    """Return the key of `ELSEWHERE` under which the command is, None: it is to be run."""
    return max((key for key in ELSEWHERE if command.text.startswith(key)), key=len, default=None)


def is_name(command: Command) -> bool:
    """Whether a sentence names a command of `decentral`, for others to give it arguments."""
    return command.inline and re.fullmatch(r"decentral \w+", command.text) is not None


RUN = [each for each in COMMANDS if each.program in ("decentral", "python") and not (elsewhere(each) or is_name(each))]
READ = [each for each in COMMANDS if each.program in OURS and each not in RUN]


def test_every_command_is_run_or_listed() -> None:
    unknown = [each for each in COMMANDS if each.program not in (*OURS, *FOREIGN)]
    assert not unknown, "commands of programs that nobody has listed"
    assert not [each for each in COMMANDS if each.program in ("make", "pytest", "pip") and not elsewhere(each)]


def test_the_lists_have_nothing_that_no_page_has() -> None:
    assert set(ELSEWHERE) == {elsewhere(each) for each in COMMANDS if not is_name(each)} - {None}
    assert set(FOREIGN) <= {each.program for each in COMMANDS}


def test_who_is_said_to_run_a_command_exists() -> None:
    for reason in (*ELSEWHERE.values(), *FOREIGN.values()):
        assert all((ROOT / path).is_file() for path in re.findall(r"tests/[\w/]+\.py", reason)), reason


# -- run ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small simulated run."""
    folder = tmp_path_factory.mktemp("runs") / "x"
    settings = [word for setting in (*SHORTER, *SMALLER) for word in ("--set", setting)]
    KNOWN.main(["simulate", *settings, "--out", str(folder)], standalone_mode=False)
    return folder


@pytest.fixture
def _a_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin in a folder with what the pages say is there: run files, the examples, and the pages' own programs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("run", "lan", "wan"):
        Path(f"{name}.toml").write_text("steps = 6\n")
    shutil.copytree(ROOT / "examples", "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for page, module in (("model", "addition"), ("rule", "pulled")):
        text = (ROOT / "docs" / f"{page}.md").read_text()
        start = re.search(r"^    (?:import|from) ", text, re.MULTILINE)
        assert start is not None
        program = re.match(r"(?:    .*\n|\n)+", text[start.start() :])
        assert program is not None
        Path(f"{module}.py").write_text("".join(line[4:] or "\n" for line in program[0].splitlines(keepends=True)))
        monkeypatch.delitem(sys.modules, module, raising=False)


@pytest.mark.usefixtures("_a_users_folder")
@pytest.mark.parametrize("command", RUN, ids=lambda command: command.text)
def test_the_command_runs(command: Command, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [str(Path(word).expanduser()) if word.startswith("~") else word for word in shlex.split(command.text)]
    for option, word in pairwise(words):
        if word.startswith("runs/") and option not in OPTIONS_THAT_WRITE:
            shutil.copytree(finished, word)
    if command.program == "python":
        assert words[1] == "-m"
        monkeypatch.setattr(sys, "argv", words[2:])
        runpy.run_module(words[2], run_name="__main__")
        return
    if any(parameter.name == "settings" for parameter in KNOWN.commands[words[1]].params):
        small = SHORTER if "--task" in words else (*SHORTER, *SMALLER)
        words += [word for setting in small for word in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None)


# -- read --------------------------------------------------------------------------------------------------------------


class _Read(Exception):
    """The arguments were read."""


@pytest.mark.parametrize("command", READ, ids=lambda command: command.text)
def test_the_command_is_understood(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command.text)
    words = words[next(place for place, word in enumerate(words) if word in OURS) :]
    if is_name(command):
        assert words[1] in KNOWN.commands
    elif words[0] == "decentral" and words[1].startswith("-"):
        assert words[1] in {option for each in KNOWN.params for option in each.opts}
    elif words[0] == "decentral":
        KNOWN.commands[words[1]].make_context(words[1], words[2:])
    elif words[:2] == ["python", "-m"]:
        _read_by_module(words[2], words[3:], monkeypatch)
    elif words[0] == "make":
        shown = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert shown.returncode == 0, shown.stderr
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert all(name in extras for name in re.findall(r"\[(\w+)\]", command.text))
    else:
        assert all((ROOT / word).is_file() for word in words[1:])


def _read_by_module(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the module's own parser read the words, if it has one; the module must be there in any case."""
    monkeypatch.syspath_prepend(str(ROOT))
    found = importlib.util.find_spec(name)
    assert found is not None
    assert found.origin is not None
    if not words or "ArgumentParser" not in Path(found.origin).read_text(encoding="utf-8"):
        return

    def stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        read(self, args, namespace)
        raise _Read

    read = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(_Read):
        runpy.run_module(name, run_name="__main__")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_commands_name_are_there(path: Path) -> None:
    page = path.relative_to(ROOT).as_posix()
    named = [word for each in COMMANDS if each.page == page for word in re.split(r"[\s='\"|]+", each.text)]
    ours = [word for word in named if re.match(r"(?:deploy|examples|tests|docs|benchmarks)/", word)]
    assert all((ROOT / word).exists() for word in ours), ours
