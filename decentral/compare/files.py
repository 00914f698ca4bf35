"""A comparison's options and files: what the command line reads, and what is left in the folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from decentral.compare.budget import Equal
from decentral.compare.comparison import Comparison
from decentral.compare.entries import folder_name
from decentral.config import Run, read_run
from decentral.errors import ConfigError
from decentral.naming import short_names

DOCUMENT = "comparison.json"
PICTURE = "compare.png"


def read_workloads(paths: Sequence[Path], settings: Sequence[str], task: str | None) -> dict[str, Run]:
    """Return the runs of the files by the files' names, or the default run as "run". Raises `ConfigError`.

    Files that are all called alike, as "run.toml" is, go by the names of their folders.
    """
    if not paths:
        return {"run": read_run(None, settings, task)}
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [path.absolute().parent.name for path in paths]
    if len(set(names)) < len(names):
        raise ConfigError(f"run files of one name: {', '.join(map(str, paths))}; call each by a name of its own")
    return {name: read_run(path, settings, task) for name, path in zip(names, paths, strict=True)}


def seeds_of(text: str) -> int | list[int]:
    """Return what --seeds says: how many, or which where there are commas. Raises `ConfigError`."""
    try:
        return [int(each) for each in text.split(",") if each.strip()] if "," in text else int(text)
    except ValueError:
        raise ConfigError(f"--seeds {text}: give how many, or which, such as --seeds 5 or --seeds 0,1,7") from None


def equal_of(text: str) -> Equal:
    """Return what --equal says; raises `ConfigError`."""
    known: tuple[Equal, ...] = get_args(Equal)
    for each in known:
        if each == text:
            return each
    raise ConfigError(f"--equal {text}: choose one of {', '.join(known)}")


def write_report(comparison: Comparison, folder: Path) -> str:
    """Leave the figures and a picture for each workload in the folder; return the figures as JSON text."""
    from decentral.report.plots import Drawn, plot_runs  # matplotlib takes half a second to import

    text = json.dumps(comparison.to_fields(), indent=2) + "\n"
    (folder / DOCUMENT).write_text(text, encoding="utf-8")
    for workload, entries in comparison.plan.workloads.items():
        called = short_names(name for name, _ in entries)
        drawn = {
            called[name]: [
                Drawn(result.curve, result.sent_a_worker)
                for result in comparison.results[workload, name]
                if result.diverged is None
            ]
            for name, _ in entries
        }
        home = folder / folder_name(workload) if len(comparison.plan.workloads) > 1 else folder
        plot_runs(drawn, comparison.headline(workload)[0], home / PICTURE)
    return text
