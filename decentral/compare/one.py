"""One run of a comparison: done, judged, and put into its folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decentral.compare.budget import Equal, fitted, measured
from decentral.compare.spread import Spread, spread_of
from decentral.config import Run
from decentral.errors import ConfigError, Diverged
from decentral.folder import RunFolder
from decentral.journal import Record
from decentral.report.curves import Curve, curve_of
from decentral.report.summary import summarize
from decentral.sim.simulate import simulate

SUMMARY = "summary.json"


def carry_out(
    run: Run,
    baseline: Run,
    equal: Equal,
    budget: float | None,
    folder: Path,
    see: Callable[[Record], None] | None = None,
) -> None:
    """Do the run with as many steps as its share of work allows, and leave its run folder at `folder`.

    The folder has that name when it is complete, and "<name>.part" before; what another process had begun there is
    begun anew. A run whose loss is not finite any more is complete too: it has diverged, and its summary says so.
    Raises `DecentralError` as `simulate` does.
    """
    if budget is None and run != baseline:
        budget = measured(baseline, equal)
    if budget is not None:
        run = fitted(run, equal, budget)
    task = run.make_task()
    part = folder.with_name(folder.name + ".part")
    files = RunFolder(part, run, before=())

    def write(record: Record) -> None:
        files.write([record])
        if see is not None:
            see(record)

    try:
        outcome = simulate(run, on_record=write)
        curve, spread = curve_of(outcome, task.headline), spread_of(run, task, outcome)
        judged = {"local_steps": run.steps, "curve": curve.to_fields(), "spread": dataclasses.asdict(spread)}
        files.finish(outcome, task, {**summarize(run, task, outcome), **judged})
    except Diverged as error:
        files.stop(str(error))
    finally:
        files.close()
    part.rename(folder)


@dataclass(frozen=True, slots=True)
class Result:
    """What one run came to, read from its folder. A run that has diverged has the reason alone."""

    folder: Path
    summary: dict[str, Any]

    @property
    def diverged(self) -> str | None:
        """Why the run did not come to its end, None if it did."""
        reason: str | None = self.summary.get("stopped")
        return reason

    @property
    def curve(self) -> Curve:
        return Curve.from_fields(self.summary["curve"])

    @property
    def spread(self) -> Spread:
        return Spread(**self.summary["spread"])

    @property
    def sent_a_worker(self) -> float:
        """Bytes that a worker sent, the mean over the fleet."""
        return self.curve.end.bytes / len({worker["worker"] for worker in self.summary["workers"]})

    @property
    def computing(self) -> float:
        """The share of their time that workers computed, the mean over the fleet."""
        spent = [worker["seconds"] for worker in self.summary["workers"]]
        busy: list[float] = [each["compute"] / max(sum(each.values()), 1e-12) for each in spent]
        return sum(busy) / len(busy)


def is_complete(folder: Path) -> bool:
    """Say whether a run was carried out there: only then is there a folder of that name."""
    return folder.exists()


def read_result(folder: Path) -> Result:
    """Return what the run of a folder came to; raises `ConfigError` if that is not readable."""
    path = folder / SUMMARY
    try:
        return Result(folder, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); remove its folder to have the run done again") from error
