"""The page on commands: what `--help` says of each."""

from __future__ import annotations

import inspect
from typing import Any

import typer

from decentral.cli import app
from website.tables import code, escaped, table


def commands_page() -> str:
    """Return the page on every command of `decentral`."""
    group: Any = typer.main.get_command(app)
    intro = "# Every command\n\n`decentral COMMAND --help` says the same in a terminal.\n"
    return "\n".join([intro, *(_command(name, command) for name, command in group.commands.items())])


def _command(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join(command.collect_usage_pieces(context))
    told = "\n\n".join(inspect.cleandoc(text) for text in (command.help, command.epilog) if text)
    rows = [_parameter(parameter) for parameter in command.params]
    return "\n".join(
        [f"## {code(name)}\n", f"    decentral {name} {usage}\n", f"{told}\n", table(("", "what it is"), rows)]
    )


def _parameter(parameter: Any) -> tuple[str, str]:
    named = parameter.param_type_name == "option"
    names = parameter.opts if named else [parameter.metavar or parameter.name.upper()]
    default = parameter.default
    shown = "" if default is None or isinstance(default, bool) else f" Default: {code(str(default))}."
    return ", ".join(code(name) for name in names), escaped(parameter.help or "") + shown
