"""Many rules on the same work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rich.table import Table

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.journal import Record
from decentral.outcome import Outcome
from decentral.report.summary import size_text, summarize
from decentral.sim.simulate import simulate
from decentral.task import Task


@dataclass(frozen=True, slots=True)
class Entry:
    """One rule's run in a comparison."""

    name: str
    run: Run
    outcome: Outcome


def entries_of(run: Run, names: Sequence[str]) -> list[tuple[str, Run]]:
    """Return the run under each rule, all checked before any starts; raises `ConfigError`."""
    if not names:
        raise ConfigError("--rules: name at least one rule, such as --rules ddp,diloco")
    for name in run.compare:
        if name not in names:
            raise ConfigError(f"compare.{name}: no such rule in --rules {','.join(names)}")
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ConfigError(f"--rules: {', '.join(doubled)} named twice")
    return [(name, run.with_rule(name)) for name in names]


def compare(runs: Sequence[tuple[str, Run]], on_record: Callable[[str, Record], None] | None = None) -> list[Entry]:
    """Simulate each run: the same task, batches, initial weights, samples, fleet and network under different rules."""
    return [
        Entry(name, run, simulate(run, on_record=None if on_record is None else partial(on_record, name)))
        for name, run in runs
    ]


def comparison(entries: Sequence[Entry], task: Task) -> list[dict[str, object]]:
    """Return a row of JSON-able figures for each rule, in the order given."""
    rows: list[dict[str, object]] = []
    for entry in entries:
        summary = summarize(entry.run, task, entry.outcome)
        sent = [worker["sent_bytes"] for worker in summary["workers"]]
        seconds = [worker["seconds"] for worker in summary["workers"]]
        busy = [spent["compute"] / max(sum(spent.values()), 1e-12) for spent in seconds]
        rows.append(
            {
                "rule": entry.name,
                "before": summary["before"],
                "after": summary["after"],
                "samples": summary["samples"],
                "virtual_seconds": summary["seconds"],
                "bytes_sent_per_worker": sum(sent) / len(sent),
                "computing": sum(busy) / len(busy),
                "fields": summary["rule"],
            }
        )
    return rows


def comparison_table(rows: Sequence[dict[str, object]], task: Task) -> Table:
    """Return the comparison as a terminal table; the best value of the headline metric stands in bold."""
    table = Table(title="same task, batches, weights, samples and fleet; virtual time")
    for column in ("rule", f"held-out {task.headline}", "samples", "virtual time", "sent a worker", "computing"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    values = [_metric(row, task) for row in rows]
    best = max(values) if task.higher_is_better else min(values)
    for row, value in zip(rows, values, strict=True):
        shown = f"{value:.4f}"
        table.add_row(
            str(row["rule"]),
            f"[bold]{shown}[/bold]" if value == best else shown,
            f"{row['samples']:,}",
            f"{row['virtual_seconds']:.1f} s",
            size_text(float(str(row["bytes_sent_per_worker"]))),
            f"{row['computing']:.0%}",
        )
    return table


def _metric(row: dict[str, object], task: Task) -> float:
    after = row["after"]
    assert isinstance(after, dict)
    return float(after[task.headline])
