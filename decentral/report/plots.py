"""Pictures of runs, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from decentral.config import Run
from decentral.outcome import Outcome
from decentral.report.summary import size_text
from decentral.task import Task


def plot_runs(outcomes: Mapping[str, Outcome], run: Run, task: Task, path: Path) -> None:
    """Draw the held-out metric of runs against samples and against seconds, and their bytes, into a picture file."""
    figure, (by_samples, by_seconds, by_bytes) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, outcome in outcomes.items():
        seen = outcome.evaluations()
        values = [record.metrics[task.headline] for record in seen]
        samples = [record.step * run.batch_size * run.fleet.size for record in seen]
        (line,) = by_samples.plot(samples, values, marker=".", label=name)
        by_seconds.plot([record.time_s for record in seen], values, marker=".", color=line.get_color())
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
    figure.savefig(path, dpi=110)
    plt.close(figure)
