"""The table and the pictures of the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from decentral.report.summary import size_text
from examples.spot_weekend.runs import Result


def line_of(result: Result) -> str:
    """Return a run in a line, for those who wait for the others."""
    where = "the p3 trace" if result.churn else "no churn"
    end = "at the target" if result.reached else "not at the target"
    return f"{result.name}, {where}, seed {result.seed}: {end} after {result.hours:.2f} h, ${result.dollars:.2f}"


def results_table(results: Sequence[Result], target: float) -> Table:
    """Return a row for each run, in the order given."""
    table = Table(title=f"until the held-out loss is {target:g} nats; >: not reached")
    for column in ("rule", "churn", "seed", "hours", "dollars", "machines", "egress", "goodput"):
        table.add_column(column, justify="right" if column not in ("rule", "churn") else "left")
    for column in ("sent", "degraded", "skipped", "lost"):
        table.add_column(column, justify="right")
    for result in results:
        beyond = "" if result.reached else "> "
        table.add_row(
            result.name,
            "p3 trace" if result.churn else "none",
            str(result.seed),
            f"{beyond}{result.hours:.2f}",
            f"{beyond}{result.dollars:.2f}",
            f"{result.machine_dollars:.2f}",
            f"{result.egress_dollars:.2f}",
            f"{result.goodput:.0%}",
            size_text(result.nbytes),
            str(result.degraded),
            str(result.skipped),
            f"{result.lost:.1%}",
        )
    return table


def plot_curves(results: Sequence[Result], target: float, path: Path) -> None:
    """Draw the loss over virtual hours and over dollars into a picture file."""
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    by_hours, by_dollars = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(result.name for result in results))
    for result in results:
        hours, dollars, losses = zip(*result.curve[1:], strict=True)  # the start would flatten all the rest
        style = {"color": f"C{names.index(result.name)}", "linestyle": "--" if result.churn else "-", "linewidth": 1.2}
        label = f"{result.name}, churn" if result.churn else result.name
        by_hours.plot(hours, losses, label=label if result.seed == results[0].seed else None, **style)
        by_dollars.plot(dollars, losses, **style)
    for axes in (by_hours, by_dollars):
        axes.axhline(target, color="black", linewidth=0.8, linestyle=":")
        axes.set(xscale="log")
    by_hours.set(xlabel="hours", ylabel="held-out loss (nats)", ylim=(target - 0.1, target + 1.2))
    by_dollars.set(xlabel="dollars")
    by_hours.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def plot_costs(results: Sequence[Result], path: Path) -> None:
    """Draw what it took each rule to reach the target without and with churn, means over seeds, into a picture file."""
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    hours, dollars = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(result.name for result in results))
    for place, name in enumerate(names):
        for churn, offset in ((False, -0.2), (True, 0.2)):
            found = [result for result in results if (result.name, result.churn) == (name, churn)]
            if not found:
                continue
            style = {"height": 0.36, "color": f"C{place}", "alpha": 0.5 if churn else 1.0}
            beyond = "" if all(result.reached for result in found) else " (not reached)"
            bars = hours.barh(place + offset, _mean([result.hours for result in found]), **style)
            hours.bar_label(bars, fmt=f"%.2f{beyond}", padding=3)
            machines, egress = (
                _mean([getattr(result, part) for result in found]) for part in ("machine_dollars", "egress_dollars")
            )
            dollars.barh(place + offset, machines, **style)
            bars = dollars.barh(place + offset, egress, left=machines, hatch="//", edgecolor="white", **style)
            dollars.bar_label(bars, [f"{machines + egress:.2f}{beyond}"], padding=3)
    hours.set(xlabel="hours to the target", yticks=range(len(names)), yticklabels=names)
    dollars.set(xlabel="dollars to the target (hatched: egress)")
    for axes in (hours, dollars):
        axes.margins(x=0.2)
    hours.set_title("full: nobody is taken away; pale: the p3 trace", fontsize=9)
    hours.invert_yaxis()
    figure.savefig(path, dpi=110)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
