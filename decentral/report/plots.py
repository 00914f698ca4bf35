"""Pictures of runs, by matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from decentral.config import Run
from decentral.journal import Evaluated, Left, Record, Trained
from decentral.report.curves import Curve, Point, looks_of
from decentral.report.summary import size_text
from decentral.task import Task

MEAN_MARKER = "D"
"""Marks what the mean of the workers would have been worth; circles and points mark models that are there."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A run in a picture: its held-out metric as it grew, and the bytes that a worker sent."""

    curve: Curve
    sent_bytes: float


def plot_runs(runs: Mapping[str, Sequence[Drawn]], headline: str, path: Path) -> None:
    """Draw the held-out metric of runs against samples and against seconds, and their bytes, into a picture file."""
    figure = runs_figure(runs, headline)
    figure.savefig(path, dpi=110)


def runs_figure(runs: Mapping[str, Sequence[Drawn]], headline: str) -> Figure:
    """Return what `plot_runs` draws: a colour for each name, a line for each of its seeds, bytes of the mean seed.

    Looks at the mean of the workers that nobody adopted are lines of their own.
    """
    figure = Figure(figsize=(13, 4), layout="constrained")
    by_samples, by_seconds, by_bytes = figure.subplots(1, 3)
    for index, (name, seeds) in enumerate(runs.items()):
        for count, drawn in enumerate(seeds):
            curve, usual = drawn.curve, {"color": f"C{index}", "alpha": 1.0 if len(seeds) == 1 else 0.6}
            seen = [point for point in curve.points if point.steps]  # the start would flatten all the rest
            label = {"label": name} if not count else {}
            _draw(by_samples, by_seconds, seen, marker=".", **label, **usual)
            for whose, looks in curve.looks.items():
                label = {"label": f"{name}: {whose}"} if not count else {}
                _draw(by_samples, by_seconds, looks, linestyle="--", marker=MEAN_MARKER, **label, **usual)
            _draw(by_samples, by_seconds, [curve.end], marker="*", markersize=11, **usual)
    sent = [sum(drawn.sent_bytes for drawn in seeds) / max(len(seeds), 1) for seeds in runs.values()]
    bars = by_bytes.barh(list(runs), sent, color=[f"C{index}" for index in range(len(sent))])
    by_bytes.bar_label(bars, [size_text(nbytes) for nbytes in sent], padding=3)
    by_bytes.set(xscale="log", xlabel="bytes sent by a worker")
    by_bytes.margins(x=0.25)
    by_bytes.invert_yaxis()
    by_samples.set(xlabel="samples (all workers)", ylabel=f"held-out {headline}")
    by_seconds.set(xlabel="seconds")
    by_samples.legend(title="first worker; star: merged")
    return figure


def _draw(by_samples: Axes, by_seconds: Axes, points: Sequence[Point], **style: Any) -> None:
    values = [point.value for point in points]
    by_samples.plot([point.samples for point in points], values, **style)
    by_seconds.plot([point.seconds for point in points], values, **{**style, "label": None})


def plot_timeline(records: Iterable[Record], run: Run, task: Task, path: Path) -> None:
    """Draw one run: the held-out metric, each worker's training loss, and what each worker did when, into a picture."""
    figure = timeline_figure(records, run, task)
    figure.savefig(path, dpi=110)


def timeline_figure(records: Iterable[Record], run: Run, task: Task) -> Figure:
    """Return what `plot_timeline` draws; looks at the mean of the workers that nobody adopted are a line of its own."""
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    metric, loss, doing = figure.subplots(3, 1, sharex=True)
    records = list(records)
    seen = [record for record in records if isinstance(record, Evaluated)]
    metric.plot(
        [record.time_s for record in seen],
        [record.metrics[task.headline] for record in seen],
        marker="o",
        label="first worker",
    )
    for whose, looks in looks_of(records).items():
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
