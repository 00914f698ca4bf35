"""Reading run folders: what stands in run.toml, journal.jsonl and summary.json, whatever became of the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from decentral.config import Run, read_run
from decentral.errors import ConfigError, DecentralError
from decentral.journal import read_journal
from decentral.report.page.history import History

JOURNAL = "journal.jsonl"


OWN_LOOP = "OwnLoop"
"""What stands as the task of runs that loops of the users' own have joined (`decentral.embedded.own_loop`)."""


@dataclass(frozen=True, slots=True)
class ReadRun:
    """A run as its folder has it. What is not there, or cannot be read any more, is None or empty; `notes` says why."""

    name: str
    folder: Path
    history: History
    run: Run | None
    run_file: str
    summary: dict[str, Any]
    headline: str
    higher_is_better: bool
    notes: tuple[str, ...]

    @property
    def stopped(self) -> str:
        """Why the run did not come to its end; empty if nobody says so."""
        return str(self.summary.get("stopped", ""))

    @property
    def joined(self) -> bool:
        """Whether it was joined by loops of the users' own: nobody summarises it, for the models stay with them."""
        return self.task == OWN_LOOP

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return "after" in self.summary or (self.joined and self.history.all_finished)

    @property
    def rule(self) -> str:
        return self.run.rule.spelling() if self.run else "unknown rule"

    @property
    def task(self) -> str:
        return str(self.run.task["name"]).rpartition(":")[2] if self.run else "unknown task"

    @property
    def workers(self) -> int:
        """Workers that the run file has, or, where that is unknown, that were seen."""
        return self.run.fleet.size if self.run else len(self.history.workers)

    @property
    def virtual(self) -> bool:
        """Whether its seconds are a simulation's: real runs have no account of their network."""
        return "accounts" in self.summary

    @property
    def accounts(self) -> dict[str, Any]:
        found: dict[str, Any] = self.summary.get("accounts", {})
        return found

    @property
    def before(self) -> float | None:
        """The headline metric before training; None: not known, or not finite."""
        looks = self.history.looks.values()
        first = [look.metrics.get(self.headline) for look in looks[:1] if look.step == 0]
        return _finite(self.summary.get("before", {}).get(self.headline, *first or [None]))

    @property
    def after(self) -> float | None:
        """The headline metric of the merged model, or of a run without one as it was evaluated last; None likewise."""
        last = [look.metrics.get(self.headline) for look in self.history.looks.values()[-1:]]
        return _finite(self.summary.get("after", {}).get(self.headline, *last or [None]))


def read_runs(paths: Sequence[Path]) -> list[ReadRun]:
    """Read the run folders at, or anywhere below, the paths.

    Raises `ConfigError` where there is none, for two of one name, and for runs that are not judged by the same metric.
    """
    found: list[ReadRun] = []
    for path in paths:
        folders = _run_folders(path)
        if not folders:
            raise ConfigError(f"{path}: there is no {JOURNAL} in or below this folder; name the folder of a run")
        found += [read_folder(folder, _name(folder, path)) for folder in folders]
    names = [run.name for run in found]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ConfigError(f"{', '.join(doubled)}: two folders of that name; give their common folder, or rename one")
    metrics = {run.headline: run.name for run in found}
    if len(metrics) > 1:
        several = ", ".join(f"{name} by {metric}" for metric, name in metrics.items())
        raise ConfigError(f"runs judged by different metrics cannot be compared: {several}; name runs of one task")
    return found


def read_folder(folder: Path, name: str) -> ReadRun:
    """Read one run's folder. Raises `ConfigError` for a journal with a line that is no record."""
    notes: list[str] = []
    summary = _summary(folder / "summary.json", notes)
    run, run_file = _run(folder / "run.toml", notes)
    journal = folder / JOURNAL
    if _is_torn(journal):
        notes.append("The journal's last line was cut short when its writer was stopped; it is left out.")
    history = History(run.fleet.size if run else 0).see_all(read_journal(journal))
    headline, higher_is_better = _headline(run, summary, history)
    return ReadRun(name, folder, history, run, run_file, summary, headline, higher_is_better, tuple(notes))


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


def _run_folders(path: Path) -> list[Path]:
    """Return the folders with a journal, without the unfinished ones of a comparison."""
    if (path / JOURNAL).is_file():
        return [path]
    below = sorted(file.parent for file in path.rglob(JOURNAL))
    return [folder for folder in below if not any(part.endswith(".part") for part in folder.parts)]


def _name(folder: Path, path: Path) -> str:
    return folder.resolve().name if folder == path else str(folder.relative_to(path))


def _run(path: Path, notes: list[str]) -> tuple[Run | None, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error.strerror}): rule, task, machines and prices are unknown.")
        return None, ""
    try:
        return read_run(path), text
    except DecentralError as error:
        notes.append(
            f"{path.name} is not a run file that can be used here, so machines and prices are unknown: {error}"
        )
        return None, text


def _summary(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        notes.append(f"{path.name} is not JSON ({error}); what it would say is left out.")
        return {}
    return found if isinstance(found, dict) else {}


def _is_torn(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, 2):
            return False
        file.seek(-1, 2)
        return file.read() != b"\n"


def _headline(run: Run | None, summary: dict[str, Any], history: History) -> tuple[str, bool]:
    """Return the metric that charts show, and whether more of it is better."""
    if run is not None:
        task = run.make_task()
        return task.headline, task.higher_is_better
    first = [next(iter(look.metrics), "loss") for look in history.looks.values()[:1]]
    return str(summary.get("headline", *first or ["loss"])), False
