"""A comparison for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from decentral.compare.entries import ALONE
from decentral.naming import short_names
from decentral.report.summary import size_text

if TYPE_CHECKING:
    from decentral.compare.comparison import Comparison

Row = Mapping[str, Any]


def comparison_tables(comparison: Comparison) -> Group:
    """Return for each workload what the rules came to and what the target took, and the scores over several."""
    return Group(*_tables(comparison))


def _tables(comparison: Comparison) -> Iterator[Table]:
    several = len(comparison.plan.workloads) > 1
    called = short_names(row["rule"] for row in comparison.rows)
    for workload in comparison.plan.workloads:
        rows = [{**row, "rule": called[row["rule"]]} for row in comparison.rows if row["workload"] == workload]
        title = f"{workload}: " if several else ""
        yield _results(comparison, rows, title)
        yield _work(comparison, rows, title)
        yield _targets(comparison, rows, title)
    if several:
        yield _scores(comparison, called)


def _results(comparison: Comparison, rows: Sequence[Row], title: str) -> Table:
    headline, higher_is_better = comparison.headline(rows[0]["workload"])
    predicted = any(row["divergence"] is not None for row in rows)
    table = _table(f"{title}models at the end", list(_notes(rows, predicted)))
    columns = ("rule", f"held-out\n{headline}", f"against\n{rows[0]['rule']}", "replicas\napart")
    for column in (*columns, *["predictions\napart"] * predicted):
        table.add_column(column, justify="left" if column == "rule" else "right")
    finals = [row["final"]["mean"] for row in rows if math.isfinite(row["final"]["mean"])]
    best = (max if higher_is_better else min)(finals, default=None)
    for row in rows:
        shown = _estimate(row["final"], "")
        apart = [] if row["distance"] is None else [f"{row['distance']:.2%}"]
        if row["divergence"] is not None:
            apart.append(f"{row['divergence']:.2g} nats")
        table.add_row(
            row["rule"],
            f"[bold]{shown}[/bold]" if row["final"]["mean"] == best else shown,
            "" if row["difference"] is None else _estimate(row["difference"], "+"),
            *(apart if row["workers"] > 1 else []),
        )
    return table


def _notes(rows: Sequence[Row], predicted: bool) -> Iterator[str]:
    seeds = len(rows[0]["runs"])
    if seeds > 1:
        yield f"means over {seeds} seeds ± 95 % t-intervals; differences are paired, seed by seed"
    yield "replicas apart: root mean square distance to their mean, by its norm"
    if predicted:
        yield "predictions apart: Jensen-Shannon divergence on held-out data"
    if any(row["rule"] == ALONE for row in rows):
        yield f"{ALONE}: the fleet's first worker by itself"
        yield f"{ALONE}_RULE: the same with RULE's outer optimiser"
    for row in rows:
        if row["diverged"]:
            yield f"{row['rule']}: {len(row['diverged'])} of {seeds} diverged: {row['diverged'][0]}"


def _work(comparison: Comparison, rows: Sequence[Row], title: str) -> Table:
    table = _table(f"{title}equal {comparison.plan.equal}; same task, batches, weights and fleet")
    for column in ("rule", "steps", "samples", "virtual time", "sent a worker", "computing"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for row in rows:
        if row["samples"] is None:
            table.add_row(row["rule"], "diverged")
            continue
        table.add_row(
            row["rule"],
            f"{row['steps']:,.0f}",
            f"{row['samples']:,.0f}",
            f"{row['virtual_seconds']:.1f} s",
            size_text(row["bytes_sent_per_worker"]),
            f"{row['computing']:.0%}",
        )
    return table


def _targets(comparison: Comparison, rows: Sequence[Row], title: str) -> Table:
    workload, seeds = rows[0]["workload"], len(rows[0]["runs"])
    headline, _ = comparison.headline(workload)
    whose = "" if workload in comparison.given_targets else f" ({rows[0]['rule']}'s at its end)"
    target = f"{title}to held-out {headline} {comparison.targets[workload]:.4f}{whose}"
    table = _table(target, ["medians over seeds"] * (seeds > 1))
    priced = all(row["to_target"]["dollars"] is not None for row in rows)
    for column in ("rule", "reached", "steps", "samples", "sent in all", "virtual time", *["cost"] * priced):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for row in rows:
        used = row["to_target"]
        shown = ["-"] * (4 + priced)
        if used["steps"] != math.inf:
            shown = [f"{used['steps']:,.0f}", f"{used['samples']:,.0f}", size_text(used["bytes"])]
            shown += [f"{used['seconds']:.1f} s", *([f"${used['dollars']:,.2f}"] if priced else [])]
        table.add_row(row["rule"], f"{row['reached']} of {seeds}", *shown)
    return table


def _scores(comparison: Comparison, called: Mapping[str, str]) -> Table:
    table = _table(
        "AlgoPerf scores over all workloads, by what the target takes",
        ["1: the least on each; 0: on none within 4 times the least; they depend on who else takes part"],
    )
    for column in ("rule", *comparison.scores):
        table.add_column(column, justify="left" if column == "rule" else "right")
    names = dict.fromkeys(name for each in comparison.scores.values() for name in each)
    for name in names:
        table.add_row(called[name], *(f"{each[name]:.3f}" for each in comparison.scores.values()))
    return table


def _estimate(found: Mapping[str, float | None], sign: str) -> str:
    mean, margin = found["mean"], found["margin"]
    if mean is None or not math.isfinite(mean):
        return "diverged"
    return f"{mean:{sign}.4f}" + ("" if margin is None else f" ± {margin:.4f}")


def _table(title: str, notes: Sequence[str] = ()) -> Table:
    caption = "\n".join(notes) or None
    return Table(title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
