"""What a comparison is to run: every entry on every workload with every seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decentral.compare.budget import Equal
from decentral.compare.entries import Entry, folder_name
from decentral.config import Run
from decentral.errors import ConfigError
from decentral.naming import class_named
from decentral.task import Task
from decentral.tasks import TASKS

SHOWN = 5
"""Differences between two plans that a message names."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a comparison, and where in its folder it goes."""

    workload: str
    entry: str
    seed: int
    run: Run
    baseline: Run
    """The run of the first entry with the same seed, whose amount of work is the measure if no budget is given."""
    folder: Path


@dataclass(frozen=True, slots=True)
class Plan:
    """Workloads by name, each with its entries (the same names in each, the baseline first), and how they are run."""

    workloads: Mapping[str, Sequence[Entry]]
    seeds: tuple[int, ...] | None
    """None: the seed of each run file alone."""
    equal: Equal
    budget: float | None
    """Samples, seconds or bytes for every run; None: as much as the first entry takes for its local steps."""

    def jobs(self) -> Iterator[Job]:
        """Yield the runs, the first seed's of all entries before the next one's."""
        for workload, entries in self.workloads.items():
            home = Path(folder_name(workload)) if len(self.workloads) > 1 else Path()
            for seed in self.seeds or (entries[0][1].seed,):
                baseline = self._seeded(entries[0][1], seed)
                for name, run in entries:
                    folder = home / folder_name(name)
                    if self.seeds is not None:
                        folder /= f"seed-{seed}"
                    yield Job(workload, name, seed, self._seeded(run, seed), baseline, folder)

    def to_fields(self) -> dict[str, Any]:
        """Return all that the results depend on, as JSON-able fields."""
        return {
            "workloads": {
                workload: {name: _identity(run) for name, run in entries}
                for workload, entries in self.workloads.items()
            },
            "seeds": None if self.seeds is None else list(self.seeds),
            "equal": self.equal,
            "budget": self.budget,
        }

    def _seeded(self, run: Run, seed: int) -> Run:
        if self.seeds is None:
            return run
        task = {**run.task, "sample_seed": seed} if _moves_samples(run) else run.task
        return run.model_copy(update={"seed": seed, "task": task})


def check_names(plan: Plan) -> None:
    """Raise `ConfigError` if two entries or two workloads would share a folder."""
    for what, names in (
        ("run files", list(plan.workloads)),
        *(("entries", [name for name, _ in entries]) for entries in plan.workloads.values()),
    ):
        folders = [folder_name(name) for name in names]
        doubled = sorted({name for name in names if folders.count(folder_name(name)) > 1})
        if doubled:
            raise ConfigError(f"{what} of one name: {', '.join(doubled)}; rename one, each has a folder of its own")


def differences(there: Any, here: Any, place: str = "") -> list[str]:
    """Return where two plans' fields differ, and how."""
    if isinstance(there, dict) and isinstance(here, dict):
        found = []
        for key in [*there, *(key for key in here if key not in there)]:
            inner = f"{place}.{key}" if place else str(key)
            if key not in here:
                found.append(f"{inner}: there, not here")
            elif key not in there:
                found.append(f"{inner}: here, not there")
            else:
                found += differences(there[key], here[key], inner)
        return found
    return [] if there == here else [f"{place}: {there} there, {here} here"]


def require_same(there: dict[str, Any], here: dict[str, Any], folder: Path) -> None:
    """Raise `ConfigError` if the folder's plan is another one."""
    found = differences(there, here)
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ConfigError(
            f"--out {folder}: another comparison is in this folder; {'; '.join(found[:SHOWN])}{more}. "
            "Name another folder, or give the same run files and options"
        )


def _identity(run: Run) -> dict[str, Any]:
    """Return the run's fields but those that change nothing of what comes out."""
    return {field: value for field, value in run.to_table().items() if field not in ("compare", "sim")}


def _moves_samples(run: Run) -> bool:
    """Say whether the task lets a seed choose its training samples."""
    try:
        cls = class_named(str(run.task["name"]), TASKS, Task, "task")
    except ValueError:
        return False  # a function that returns a task: its arguments are its own
    return "sample_seed" in cls.model_fields
