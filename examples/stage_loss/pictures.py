"""The table and the pictures of the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from examples.stage_loss.paper import ONE, relative_hours
from examples.stage_loss.runs import NO_LOSSES, RATES, Result


def line_of(result: Result) -> str:
    """Return a run in a line, for those who wait for the others."""
    end = "at the target" if result.reached else "not at the target"
    return (
        f"{result.way}, {result.rate:.0%} an hour, seed {result.seed}: {end} after {result.hours:.2f} h, "
        f"{result.iterations} iterations, {result.losses} losses"
    )


def results_table(results: Sequence[Result], target: float) -> Table:
    """Return a row for each way and rate, with means over seeds."""
    table = Table(title=f"until the held-out loss is {target:g} nats; >: not reached")
    table.add_column("way to recover")
    for column in ("lost an hour", "losses", "iterations", "s / iteration", "hours", "relative", "the paper's"):
        table.add_column(column, justify="right")
    for way, rate in dict.fromkeys((result.way, result.rate) for result in results):
        found = _of(results, way, rate)
        beyond = "" if all(result.reached for result in found) else "> "
        hours, iterations = _mean([result.hours for result in found]), _mean([result.iterations for result in found])
        losses, paper = [result.losses for result in found], relative_hours(way, rate)
        table.add_row(
            way,
            f"{rate:.0%}",
            "" if None in losses else f"{_mean(losses):g}",
            f"{beyond}{iterations:g}",
            f"{3600 * hours / iterations:.1f}",
            f"{beyond}{hours:.2f}",
            f"{beyond}{relative(results, way, rate):.2f}",
            "" if paper is None else f"{paper:.2f}",
        )
    return table


def relative(results: Sequence[Result], way: str, rate: float) -> float:
    """Return mean hours to the target relative to those of CheckFree at 5 %."""
    hours = _mean([result.hours for result in _of(results, way, rate)])
    return hours / _mean([result.hours for result in _of(results, *ONE)])


def plot_curves(results: Sequence[Result], target: float, path: Path) -> None:
    """Draw the first seed's loss over virtual hours, a panel for each rate of losses, into a picture file."""
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    panels = figure.subplots(1, len(RATES), sharex=True, sharey=True)
    colors = _colors(results)
    first = [result for result in results if result.seed == results[0].seed]
    for axes, rate in zip(panels, RATES, strict=True):
        for result in first:
            if result.rate == rate or result.way == NO_LOSSES:
                hours, _, losses = zip(*result.curve[1:], strict=True)  # the start would flatten all the rest
                axes.plot(hours, losses, label=result.way, color=colors[result.way], linewidth=1.0)
        axes.axhline(target, color="black", linewidth=0.8, linestyle=":")
        axes.set(xlabel="hours", title=f"{rate:.0%} of stages lost an hour", ylim=(target - 0.05, target + 0.9))
    panels[0].set(ylabel="held-out loss (nats)")
    panels[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def plot_hours(results: Sequence[Result], path: Path) -> None:
    """Draw hours to the target relative to CheckFree's at 5 %, ours beside the paper's, into a picture file."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots()
    rows = [pair for pair in dict.fromkeys((result.way, result.rate) for result in results) if pair[1]]
    colors = _colors(results)
    for place, (way, rate) in enumerate(rows):
        found, paper = _of(results, way, rate), relative_hours(way, rate)
        beyond = "" if all(result.reached for result in found) else " (not reached)"
        bars = axes.barh(place, relative(results, way, rate), color=colors[way], height=0.7)
        axes.bar_label(bars, fmt=f"%.2f{beyond}", label_type="center", fontsize=8)
        if paper is not None:
            axes.plot(paper, place, marker="D", color="black", markersize=5)
    axes.set(yticks=range(len(rows)), yticklabels=[f"{way}, {rate:.0%}" for way, rate in rows])
    axes.set(xlabel="hours to the target, relative to CheckFree's at 5 % an hour (diamonds: the paper's)")
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)


def _colors(results: Sequence[Result]) -> dict[str, str]:
    return {way: f"C{place}" for place, way in enumerate(dict.fromkeys(result.way for result in results))}


def _of(results: Sequence[Result], way: str, rate: float) -> list[Result]:
    return [result for result in results if (result.way, result.rate) == (way, rate)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
