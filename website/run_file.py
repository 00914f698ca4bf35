"""The page on run files: every section and every key, from the models that read them."""

from __future__ import annotations

from collections.abc import Iterator

from decentral.config import Run
from decentral.part import Section
from website.fields import fields_table, sections_of
from website.tables import code, prose

INTRO = """# The run file

A TOML file, of which nothing is required: what it does not say is the default. `decentral train`, `simulate`, `compare`
and `profile` read it, and every run leaves in its folder one that says everything. `--set fleet.up_bps=20e6` changes a
field from the command line; lists are replaced as a whole: `--set 'fleet.workers=[{count = 8}]'`. An unknown key, or a
value that is not allowed, ends the command before anything has begun.

"""


def run_file_page() -> str:
    """Return the reference of the run file."""
    return INTRO + "\n".join(_section(Run, "", several=False))


def _section(section: type[Section], path: str, *, several: bool) -> Iterator[str]:
    """Yield the description of a section, and after it those of the sections in it."""
    heading = f"[[{path}]]" if several else f"[{path}]"
    yield f"## {code(heading) if path else 'At the top'}\n"
    if path:
        yield prose(section)
    yield fields_table(section)
    for name, inner, many in sections_of(section):
        yield from _section(inner, f"{path}.{name}" if path else name, several=many)
