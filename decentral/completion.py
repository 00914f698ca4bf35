"""What a shell may complete: names of rules and tasks, fields of the run file.

The names of commands and options come from the command line alone; what is behind the names here, torch above all, is
imported when one of these is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from decentral.errors import DecentralError

if TYPE_CHECKING:
    from decentral.part import Part


def complete_rules(incomplete: str) -> list[str]:
    """Return rules for the last name of a list with commas, each with the names before it."""
    from decentral.protocols import RULES

    before, comma, name = incomplete.rpartition(",")
    return [f"{before}{comma}{rule}" for rule in sorted(RULES) if rule.startswith(name)]


def complete_task(incomplete: str) -> list[str]:
    """Return the names of built-in tasks."""
    from decentral.tasks import TASKS

    return [task for task in sorted(TASKS) if task.startswith(incomplete)]


def complete_setting(context: typer.Context, incomplete: str) -> list[str]:
    """Return fields of the run file on the command line, or of the default run, each with the sign after it."""
    from decentral.config import Run, read_run

    # The option being completed has no value yet, so the parser has left alone what stands before it.
    words = [word for word in (context.params.get("run_file"), *context.args) if word]
    try:
        run = read_run(Path(words[0]) if words else None)
    except DecentralError:  # who asks for a completion is not to hear of the file's mistakes yet
        run = Run()
    return [f"{field}=" for field in fields_of(run) if field.startswith(incomplete)]


def fields_of(part: Part, path: str = "") -> Iterator[str]:
    """Yield the fields of a part, those of the parts in it too, with points between them."""
    from decentral.part import Part

    for name in type(part).model_fields:
        value = getattr(part, name)
        yield path + name
        if isinstance(value, Part):
            yield from fields_of(value, f"{path}{name}.")
