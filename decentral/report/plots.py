"""Pictures of runs, by matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from decentral.config import Run
from decentral.journal import Counterfactual, Evaluated, Left, Record, Trained
from decentral.outcome import Outcome
from decentral.report.summary import size_text
from decentral.task import Task

MEAN_MARKER = "D"
"""Marks what the mean of the workers would have been worth; circles and points mark models that are there."""


def plot_runs(outcomes: Mapping[str, Outcome], run: Run, task: Task, path: Path) -> None:
    """Draw the held-out metric of runs against samples and against seconds, and their bytes, into a picture file."""
    figure = runs_figure(outcomes, run, task)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def runs_figure(outcomes: Mapping[str, Outcome], run: Run, task: Task) -> Figure:
    """Return what `plot_runs` draws; looks at the mean of the workers that nobody adopted are lines of their own."""
    figure, (by_samples, by_seconds, by_bytes) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, outcome in outcomes.items():
        seen = [record for record in outcome.evaluations() if record.step]  # the start would flatten all the rest
        values = [record.metrics[task.headline] for record in seen]
        samples = [record.step * run.batch_size * run.fleet.size for record in seen]
        (line,) = by_samples.plot(samples, values, marker=".", label=name)
        by_seconds.plot([record.time_s for record in seen], values, marker=".", color=line.get_color())
        for whose, looks in _looks(outcome.records).items():
            values = [record.metrics[task.headline] for record in looks]
            places = [record.step * run.batch_size * run.fleet.size for record in looks]
            style = {"linestyle": "--", "marker": MEAN_MARKER, "color": line.get_color()}
            by_samples.plot(places, values, label=f"{name}: {whose}", **style)
            by_seconds.plot([record.time_s for record in looks], values, **style)
        merged = outcome.after[task.headline]
        by_samples.plot(samples[-1:], [merged], marker="*", markersize=11, color=line.get_color())
        by_seconds.plot([outcome.seconds], [merged], marker="*", markersize=11, color=line.get_color())
    sent = [max((left.sent_bytes for left in outcome.left()), default=0) for outcome in outcomes.values()]
    bars = by_bytes.barh(list(outcomes), sent, color=[f"C{index}" for index in range(len(sent))])
    by_bytes.bar_label(bars, [size_text(nbytes) for nbytes in sent], padding=3)
    by_bytes.set(xscale="log", xlabel="bytes sent by a worker")
    by_bytes.margins(x=0.25)
    by_bytes.invert_yaxis()
    by_samples.set(xlabel="samples (all workers)", ylabel=f"held-out {task.headline}")
    by_seconds.set(xlabel="seconds")
    by_samples.legend(title="first worker; star: merged")
    return figure


def plot_timeline(records: Iterable[Record], run: Run, task: Task, path: Path) -> None:
    """Draw one run: the held-out metric, each worker's training loss, and what each worker did when, into a picture."""
    figure = timeline_figure(records, run, task)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def timeline_figure(records: Iterable[Record], run: Run, task: Task) -> Figure:
    """Return what `plot_timeline` draws; looks at the mean of the workers that nobody adopted are a line of its own."""
    figure, (metric, loss, doing) = plt.subplots(3, 1, figsize=(10, 7.5), layout="constrained", sharex=True)
    records = list(records)
    seen = [record for record in records if isinstance(record, Evaluated)]
    metric.plot(
        [record.time_s for record in seen],
        [record.metrics[task.headline] for record in seen],
        marker="o",
        label="first worker",
    )
    for whose, looks in _looks(records).items():
        values = [record.metrics[task.headline] for record in looks]
        metric.plot([record.time_s for record in looks], values, linestyle="--", marker=MEAN_MARKER, label=whose)
        metric.legend()
    metric.set(ylabel=f"held-out {task.headline}", title=f"{run.rule.spelling()}, {run.fleet.size} unequal workers")
    for worker, group in enumerate(run.fleet.each()):
        phases = [record for record in records if isinstance(record, Trained) and record.worker == worker]
        loss.plot([phase.time_s for phase in phases], [phase.loss for phase in phases], label=f"{worker}")
        bars = [(phase.time_s - phase.seconds, phase.seconds) for phase in phases]
        doing.broken_barh(bars, (worker - 0.4, 0.8), color=f"C{worker}")
        ends = [record.time_s for record in records if isinstance(record, Left) and record.worker == worker]
        doing.barh(worker, ends or [0.0], height=0.8, color="lightgrey", zorder=0)
        doing.text(0, worker, f" speed {group.speed:g}", va="center", fontsize=8)
    loss.set(ylabel="training loss")
    loss.legend(title="worker", ncols=4)
    doing.set(xlabel="seconds", ylabel="worker", yticks=range(run.fleet.size))
    doing.set_title("coloured: local steps; grey: talking and waiting", fontsize=9)
    doing.invert_yaxis()
    return figure


def _looks(records: Iterable[Record]) -> dict[str, list[Counterfactual]]:
    """Return the looks at means of workers, one a step, by whose these were: all workers', or each group's."""
    found: dict[int, list[Counterfactual]] = {}
    for record in records:
        if isinstance(record, Counterfactual):
            looks = found.setdefault(min(record.members), [])
            if not looks or looks[-1].step < record.step:  # all workers of a group may have looked
                looks.append(record)
    several = len(found) > 1
    return {f"group of worker {first}" if several else "mean of workers": found[first] for first in sorted(found)}
