"""What a run came to, as numbers and as a table."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from decentral.config import Run
from decentral.journal import Joined, Synced
from decentral.outcome import Outcome
from decentral.task import Task


def summarize(run: Run, task: Task, outcome: Outcome) -> dict[str, Any]:
    """Return the run's figures as JSON-able fields: metrics, samples, seconds, and each worker's accounts."""
    parameters = next((record.parameters for record in outcome.records if isinstance(record, Joined)), 0)
    rounds: dict[str, int] = {}
    for record in outcome.records:
        if isinstance(record, Synced):
            rounds[record.outcome] = rounds.get(record.outcome, 0) + 1
    return {
        "rule": run.rule.to_table(),
        "headline": task.headline,
        "before": outcome.before,
        "after": outcome.after,
        "parameters": parameters,
        "samples": outcome.samples(),
        "seconds": outcome.seconds,
        "data_parallel_bytes": data_parallel_bytes(parameters, run.fleet.size, run.steps),
        "round_outcomes": rounds,
        "workers": [
            {
                "worker": left.worker,
                "speed": group.speed,
                "reason": left.reason,
                "steps": left.step,
                "sent_bytes": left.sent_bytes,
                "received_bytes": left.received_bytes,
                "seconds": left.seconds,
            }
            for left, group in zip(outcome.left(), run.fleet.each(), strict=True)
        ],
    }


def data_parallel_bytes(parameters: int, workers: int, steps: int) -> int:
    """Return what each worker of float32 data-parallel training sends: 2 (n - 1) / n of the gradient in every step."""
    return round(2 * (workers - 1) / workers * 4 * parameters * steps)


def summary_table(summary: dict[str, Any]) -> Table:
    """Return the run's closing table."""
    headline = summary["headline"]
    title = f"{summary['rule']['name']}: {summary['samples']:,} samples in {summary['seconds']:.1f} s"
    if summary["after"]:
        title += f", held-out {headline} {summary['before'][headline]:.3f} -> {summary['after'][headline]:.3f}"
    table = Table(title=title, caption=_rounds(summary["round_outcomes"]), box=SIMPLE_HEAD, pad_edge=False)
    for column in ("worker", "steps", "sent", "data-\nparallel", "compute", "talk", "wait", "end"):
        table.add_column(column, justify="left" if column == "end" else "right")
    for worker in summary["workers"]:
        table.add_row(
            f"{worker['worker']} at {worker['speed']:g}",
            str(worker["steps"]),
            size_text(worker["sent_bytes"]),
            size_text(summary["data_parallel_bytes"]),
            *(f"{worker['seconds'][kind]:.1f} s" for kind in ("compute", "talk", "wait")),
            worker["reason"],
        )
    return table


def size_text(nbytes: float) -> str:
    """Return a number of bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def _rounds(outcomes: dict[str, int]) -> str:
    if not outcomes:
        return "no rounds"
    return "worker-rounds " + ", ".join(f"{outcome} {count}" for outcome, count in sorted(outcomes.items()))
