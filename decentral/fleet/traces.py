"""Traces of real spot machines: three file formats in, one sequence of changes out.

- **Bamboo** (Thorpe et al., NSDI 2023), a line for each change: `milliseconds,add,node` or `milliseconds,remove,node`;
- **counts**, as logged on Google Cloud for the same paper, a line for each sample: `2021-12-11, 11:11:30, 55`;
- **SkyPilot** (Wu et al., NSDI 2024), JSON: `{"metadata": {"gap_seconds": 300}, "data": [4, 4, 1, ...]}`, how many
  machines are there at each tick.

Formats are told apart by their contents. The built-in traces are Bamboo's (MIT, see `data/LICENSE-bamboo`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from decentral.errors import ConfigError

TRACES = {"bamboo:p3": "p3-trace.csv", "bamboo:g4dn": "g4dn-trace.csv", "bamboo:a100": "a100x1-east1b.txt"}
"""The built-in traces: up to 32 p3.2xlarge (V100) and 24 g4dn (T4) of AWS for 11 hours, up to 64 A100 of Google Cloud
for 27 hours."""

MOST_MACHINES = 100_000
LONGEST_GAP_S = 6 * 3600.0
"""Samples that are further apart leave a gap in which anything may have happened."""


class Change(NamedTuple):
    """One machine comes (`came`) or goes, `at_s` seconds after the trace begins. `node` is None where only counts are
    known: then any machine may be the one that goes."""

    at_s: float
    came: bool
    node: str | None


def read_trace(source: str) -> tuple[Change, ...]:
    """Return the changes of a built-in trace or of a file, in order of time; `ConfigError` has file and line."""
    if source in TRACES:
        text = (resources.files("decentral.fleet") / "data" / TRACES[source]).read_text(encoding="utf-8")
    else:
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a text file"
            raise ConfigError(f"{source}: cannot read the trace: {reason}; built-in: {', '.join(TRACES)}") from error
    if text.lstrip().startswith("{"):
        return _skypilot(source, text)
    rows = [(number, [cell.strip() for cell in line.split(",")]) for number, line in _lines(text)]
    if not rows:
        raise ConfigError(f"{source}: the trace is empty")
    return _bamboo(source, rows) if rows[0][1][1:2] in (["add"], ["remove"]) else _counts(source, rows)


def _lines(text: str) -> Iterable[tuple[int, str]]:
    lines = text.rstrip().splitlines()
    return enumerate(lines, 1) if lines != [""] else ()


def _bamboo(source: str, rows: list[tuple[int, list[str]]]) -> tuple[Change, ...]:
    changes: list[Change] = []
    there: set[str] = set()
    for line, cells in rows:
        where = f"{source}:{line}"
        if len(cells) != 3 or cells[1] not in ("add", "remove") or not cells[2]:
            _refuse(where, f"expected milliseconds,add,node or milliseconds,remove,node, got '{','.join(cells)}'")
        at_s = _number(where, "time in milliseconds", cells[0]) / 1000
        _check_order(where, at_s, changes[-1].at_s if changes else 0.0)
        came, node = cells[1] == "add", cells[2]
        if came == (node in there):
            _refuse(where, f"{node} is added but there already" if came else f"{node} is removed but not there")
        there ^= {node}
        changes.append(Change(at_s, came, node))
    return tuple(changes)


def _counts(source: str, rows: list[tuple[int, list[str]]]) -> tuple[Change, ...]:
    samples: list[tuple[float, int]] = []
    first: datetime | None = None
    for line, cells in rows:
        where = f"{source}:{line}"
        if len(cells) != 3:
            _refuse(where, f"expected date, time, count such as 2021-12-11, 11:11:30, 55, got '{','.join(cells)}'")
        try:
            when = datetime.strptime(f"{cells[0]} {cells[1]}", "%Y-%m-%d %H:%M:%S")
        except ValueError:
            _refuse(where, f"expected a date and a time such as 2021-12-11, 11:11:30, got '{cells[0]}, {cells[1]}'")
        first = first or when
        at_s = (when - first).total_seconds()
        _check_order(where, at_s, samples[-1][0] if samples else 0.0)
        if samples and at_s - samples[-1][0] > LONGEST_GAP_S:
            _refuse(where, f"a gap: no sample for {(at_s - samples[-1][0]) / 3600:.1f} h, at most 6 h are bridged")
        samples.append((at_s, _count(where, cells[2])))
    return _changes(samples)


def _skypilot(source: str, text: str) -> tuple[Change, ...]:
    try:
        table: Any = json.loads(text)
        gap_s, data = table["metadata"]["gap_seconds"], table["data"]
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source}:{error.lineno}: not valid JSON: {error.msg}") from error
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f'{source}: expected {{"metadata": {{"gap_seconds": 300}}, "data": [4, 4, 1, ...]}}'
        ) from error
    if isinstance(gap_s, bool) or not isinstance(gap_s, int | float) or not 0 < gap_s <= LONGEST_GAP_S:
        raise ConfigError(f"{source}: metadata.gap_seconds: {gap_s!r}; it must be above 0 and at most 6 hours")
    if not isinstance(data, list) or not data:
        raise ConfigError(f"{source}: data: expected a list of counts, such as [4, 4, 1]")
    return _changes([(tick * gap_s, _count(f"{source}: data[{tick}]", count)) for tick, count in enumerate(data)])


def _changes(samples: list[tuple[float, int]]) -> tuple[Change, ...]:
    changes: list[Change] = []
    there = 0
    for at_s, count in samples:
        changes += [Change(at_s, count > there, None)] * abs(count - there)
        there = count
    return tuple(changes)


def _number(where: str, what: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        _refuse(where, f"expected a {what}, got '{text}'")
    if not 0 <= value < float("inf"):
        _refuse(where, f"a {what} must be 0 or more, got '{text}'")
    return value


def _count(where: str, value: object) -> int:
    if value is None or value == "":
        _refuse(where, "a gap: the count is missing")
    try:
        count = int(str(value))
    except ValueError:
        _refuse(where, f"expected a number of machines, got '{value}'")
    if not 0 <= count <= MOST_MACHINES:
        _refuse(where, f"{count} machines; a count must be 0 to {MOST_MACHINES}")
    return count


def _check_order(where: str, at_s: float, before_s: float) -> None:
    if at_s < before_s:
        _refuse(where, f"out of order: {at_s:g} s after the beginning, but the line before is at {before_s:g} s")


def _refuse(where: str, reason: str) -> NoReturn:
    raise ConfigError(f"{where}: {reason}")
