"""What `--help` teaches: each command has an example that its own parser takes, and says what it leaves."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from decentral.cli import app

GROUP: Any = typer.main.get_command(app)


def example(epilog: str) -> list[str]:
    """Return the words of the example below a command's options."""
    found = re.match(r"Example: (decentral .*)", epilog or "")
    assert found is not None, "its help has no example"
    return shlex.split(found[1])


@pytest.mark.parametrize("name", GROUP.commands)
def test_the_example_is_of_the_command_and_its_parser_takes_it(name: str) -> None:
    _, called, *words = example(GROUP.commands[name].epilog)
    assert called == name
    GROUP.commands[name].make_context(name, words)


@pytest.mark.parametrize("name", GROUP.commands)
def test_every_option_and_argument_says_what_it_is(name: str) -> None:
    assert not [parameter.name for parameter in GROUP.commands[name].params if not parameter.help]


def test_the_help_of_all_begins_with_what_to_try_first() -> None:
    words = example(GROUP.epilog)
    GROUP.commands[words[1]].make_context(words[1], words[2:])
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "Example: decentral simulate --out runs/first" in shown
