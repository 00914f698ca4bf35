"""A comparison as one value: which runs, what each came to, and what that says of the rules."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Group

from decentral.compare.budget import Equal
from decentral.compare.entries import entries_of
from decentral.compare.intervals import Estimate, estimate, paired
from decentral.compare.one import Result, read_result
from decentral.compare.plan import Plan, check_names, require_same
from decentral.compare.score import median_time, score
from decentral.compare.table import comparison_tables
from decentral.compare.targets import default_target, used_up_to
from decentral.compare.work import Tell, work_through
from decentral.config import Run
from decentral.errors import ConfigError
from decentral.report.curves import MEASURES, Curve

PLAN = "plan.json"
FIGURES = (
    *("steps", "samples", "virtual_seconds", "bytes", "bytes_sent_per_worker", "dollars", "computing"),
    *("distance", "divergence"),
)
"""Of a row: means over the seeds that have not diverged; None if there are none, or a figure is not known of each."""
VERSION = 1
"""Of the JSON document; it changes when a field changes its meaning or goes."""


def compare(
    workloads: Run | Mapping[str, Run],
    rules: Sequence[str],
    *,
    seeds: int | Sequence[int] | None = None,
    equal: Equal = "samples",
    budget: float | None = None,
    vary: Sequence[str] = (),
    controls: bool = False,
    target: float | Mapping[str, float] | None = None,
    folder: Path | None = None,
    address: str | None = None,
    tell: Tell = lambda _words: None,
) -> Comparison:
    """Simulate each run under each rule and return what came out; the first rule is the baseline of the others.

    `seeds`: so many from 0 on, or these; None: the run's own. All entries meet the same seeds. `equal` and `budget` say
    what all get the same amount of (None: as much as the baseline takes for its local steps). `vary`, such as
    "rule.period=10,50", and `controls` add entries. `target`, for all workloads or by workload, is the value of the
    headline metric that counts as reached; None: the baseline's median final value. Runs are kept in `folder` (None:
    nowhere), and those that are there are not done again. `address` names a Ray cluster. Raises `ConfigError`, before
    anything runs, for what does not go together, and as `simulate` does.
    """
    named = {"run": workloads} if isinstance(workloads, Run) else dict(workloads)
    entries = {name: entries_of(run, rules, vary, controls) for name, run in named.items()}
    plan = Plan(entries, _seeds(seeds), equal, budget)
    check_names(plan)
    targets = target if isinstance(target, Mapping) else {} if target is None else dict.fromkeys(named, target)
    if folder is not None:
        _begin(plan, folder)
        work_through(plan, folder, address, tell)
        return read_comparison(plan, folder, targets)
    with tempfile.TemporaryDirectory(prefix="decentral-compare-") as place:
        work_through(plan, Path(place), address, tell)
        return read_comparison(plan, Path(place), targets)


@dataclass(frozen=True)
class Comparison:
    """Rules on the same work: `rows`, what each came to; `scores`, over all workloads; `results`, run by run."""

    plan: Plan
    results: Mapping[tuple[str, str], Sequence[Result]]
    """(workload, entry) -> a result for each seed."""
    given_targets: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def targets(self) -> dict[str, float]:
        """The value of the headline metric that counts as reached, by workload."""
        return {workload: self._target(workload) for workload in self.plan.workloads}

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """A row of figures for each workload and entry, in the order given: means over seeds, times as medians."""
        return [self._row(workload, entry) for workload, entry in self.results]

    @cached_property
    def scores(self) -> dict[str, dict[str, float]]:
        """AlgoPerf scores by measure and entry, 0 to 1, as `score.score` says. Dollars only where prices are known."""
        found = {}
        for measure in MEASURES:
            times: dict[str, dict[str, float]] = {workload: {} for workload in self.plan.workloads}
            for row in self.rows:
                times[row["workload"]][row["rule"]] = row["to_target"][measure]
            if all(time is not None for each in times.values() for time in each.values()):
                names = dict.fromkeys(name for each in times.values() for name in each)
                found[measure] = {name: score(times, name) for name in names}
        return found

    def headline(self, workload: str) -> tuple[str, bool]:
        """Return the metric that the workload's task is judged by, and whether more of it is better."""
        task = self.plan.workloads[workload][0][1].make_task()
        return task.headline, task.higher_is_better

    def to_fields(self) -> dict[str, Any]:
        """Return the comparison as one JSON-able document; what is infinite or unknown is None."""
        fields = {
            "version": VERSION,
            "equal": self.plan.equal,
            "budget": self.plan.budget,
            "seeds": self.plan.seeds,
            "workloads": {
                workload: {"headline": self.headline(workload)[0], "target": target}
                for workload, target in self.targets.items()
            },
            "rows": self.rows,
            "scores": self.scores,
        }
        plain: dict[str, Any] = _plain(fields)
        return plain

    def table(self) -> Group:
        """Return the comparison for the terminal, by `rich`."""
        return comparison_tables(self)

    def _target(self, workload: str) -> float:
        if workload in self.given_targets:
            return self.given_targets[workload]
        baseline = self.results[workload, self.plan.workloads[workload][0][0]]
        return default_target([_final(result) for result in baseline], self.headline(workload)[1])

    def _row(self, workload: str, entry: str) -> dict[str, Any]:
        results = self.results[workload, entry]
        baseline = self.results[workload, self.plan.workloads[workload][0][0]]
        run = dict(self.plan.workloads[workload])[entry]
        used = [used_up_to(_curve(result), self.targets[workload], self.headline(workload)[1]) for result in results]
        whole = [result for result in results if result.diverged is None]
        difference = None if results is baseline else _estimate(results, baseline)
        return {
            "workload": workload,
            "rule": entry,
            "workers": run.fleet.size,
            "final": _fields(_estimate(results)),
            "difference": None if difference is None else _fields(difference),
            "finals": [_final(result) for result in results],
            "before": [result.summary["before"] for result in whole],
            "after": [result.summary["after"] for result in whole],
            "diverged": [result.diverged for result in results if result.diverged is not None],
            **{name: _mean([figures[name] for figures in map(_figures, whole)]) for name in FIGURES},
            "to_target": {measure: _median([each[measure] for each in used]) for measure in MEASURES},
            "reached": sum(each["steps"] != math.inf for each in used),
            "runs": [
                {"folder": str(result.folder), "to_target": each} for result, each in zip(results, used, strict=True)
            ],
            "fields": run.rule.to_table(),
        }


def read_comparison(plan: Plan, folder: Path, targets: Mapping[str, float]) -> Comparison:
    """Return what the plan's runs, all complete in the folder, came to; raises `ConfigError` if one is not."""
    results: dict[tuple[str, str], list[Result]] = {}
    for job in plan.jobs():
        results.setdefault((job.workload, job.entry), []).append(read_result(folder / job.folder))
    return Comparison(plan, results, targets)


def _begin(plan: Plan, folder: Path) -> None:
    """Have the folder be this comparison's; raises `ConfigError` if it is another's, or a run's."""
    fields = json.loads(json.dumps(plan.to_fields()))
    path, fresh = folder / PLAN, folder / (PLAN + ".new")
    if path.exists():
        require_same(json.loads(path.read_text(encoding="utf-8")), fields, folder)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(held.name != fresh.name for held in folder.iterdir()):
            raise ConfigError(f"--out {folder}: the folder holds something else than a comparison; name another one")
        fresh.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot make the folder: {error.strerror}") from error


def _seeds(seeds: int | Sequence[int] | None) -> tuple[int, ...] | None:
    chosen = None if seeds is None else tuple(range(seeds) if isinstance(seeds, int) else seeds)
    if chosen is not None and (not chosen or min(chosen) < 0 or len(set(chosen)) < len(chosen)):
        raise ConfigError(f"--seeds {seeds}: give how many, or different seeds from 0 on, such as --seeds 5 or 0,1,7")
    return chosen


def _figures(result: Result) -> dict[str, float | None]:
    """Return the figures of a row that are one run's."""
    end, spread = result.curve.end, result.spread
    figures = (
        end.steps,
        result.summary["samples"],
        end.seconds,
        end.bytes,
        result.sent_a_worker,
        end.dollars,
        result.computing,
        spread.distance,
        spread.divergence,
    )
    return dict(zip(FIGURES, figures, strict=True))


def _curve(result: Result) -> Curve | None:
    return None if result.diverged is not None else result.curve


def _final(result: Result) -> float:
    return math.nan if result.diverged is not None else result.curve.end.value


def _estimate(results: Sequence[Result], baseline: Sequence[Result] | None = None) -> Estimate:
    """Return the mean of the final values, or of what they are above the baseline's with the same seed."""
    finals = [_final(result) for result in results]
    if baseline is None:
        return estimate(finals)
    return paired(finals, [_final(result) for result in baseline])


def _fields(found: Estimate) -> dict[str, float | None]:
    return {"mean": found.mean, "margin": found.margin}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median_time(known) if len(known) == len(values) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
