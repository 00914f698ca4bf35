"""A plan for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from decentral.fleet.units import HOUR_S
from decentral.plan.crews import told
from decentral.plan.forecast import steps_of_a_round
from decentral.plan.laws import MOST_REPLICAS
from decentral.plan.wanted import Option
from decentral.protocols import DDP, Float32, Layers, StreamingDiLoCo, SyncRule
from decentral.report.summary import dollars_text, size_text

if TYPE_CHECKING:
    from decentral.plan.neighbours import Change
    from decentral.plan.plan import Plan


def plan_tables(plan: Plan) -> Group:
    """Return the first choice with its runners-up, and what would change it."""
    tables = [_options(plan)]
    if plan.changes:
        tables.append(_changes(plan))
    return Group(*tables)


def settings_text(rule: SyncRule) -> str:
    """Return a rule and what a plan chooses of it: H and codec."""
    period = steps_of_a_round(rule)
    codec = getattr(rule, "codec", Float32())
    return " ".join([rule.spelling(), *[f"H={period}"] * (not isinstance(rule, DDP)), codec.spelling()])


def time_text(seconds: float) -> str:
    """Return a time for people."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 2 * HOUR_S:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / HOUR_S:.3g} h" if seconds < 100 * HOUR_S else f"{seconds / 24 / HOUR_S:.3g} days"


def _options(plan: Plan) -> Table:
    known = plan.first.forecast.dollars is not None
    losses = any(plan.loss(option) is not None for option in (plan.first, *plan.runners_up))
    work = f"{plan.work.samples:,} samples, {plan.work.parameters:,} parameters"
    least = "least time" if plan.wanted.goal == "time" else "least cost"
    table = _table(f"{work}: {least}", "\n".join(_notes(plan, losses)))
    columns = ("rule", "workers", "time", *["cost"] * known, "computing", "sent a\nworker", *["loss"] * losses)
    for column in columns:
        table.add_column(column, justify="left" if column in ("rule", "workers") else "right")
    for option in (plan.first, *plan.runners_up):
        loss, forecast, run = plan.loss(option), option.forecast, option.run
        table.add_row(
            settings_text(run.rule),
            told(run.fleet.workers),
            time_text(forecast.seconds),
            *([dollars_text(forecast.dollars)] if forecast.dollars is not None else []),
            f"{forecast.computing:.0%}",
            size_text(forecast.sent_bytes / run.fleet.size),
            *(["" if loss is None else f"{loss:+.1%}"] * losses),
            style="bold" if option is plan.first else "",
        )
    return table


def _notes(plan: Plan, losses: bool) -> Iterator[str]:
    yield "samples: assumed equal for all rules"
    yield f"first: of what is within {100 * plan.wanted.slack:.3g}% of the best, the nearest to data parallelism"
    yield "below it: the best under each other rule and with other numbers of workers"
    for option in (plan.first, *plan.runners_up):
        if isinstance(option.run.rule, StreamingDiLoCo):
            yield f"streaming_diloco: {_fragments(option.run.rule)}"
            break
    if losses:
        yield f"loss: above data parallelism's, by arXiv 2503.09799 (H = 30, at most {MOST_REPLICAS} workers)"


def _fragments(rule: StreamingDiLoCo) -> str:
    cut = rule.fragments
    return f"fragments of {cut.layers} layers" if isinstance(cut, Layers) else f"fragments '{cut.spelling()}'"


def _changes(plan: Plan) -> Table:
    table = _table("what would change the answer")
    for column in ("all else being equal, with", "first is", "workers", "time"):
        table.add_column(column, justify="right" if column == "time" else "left")
    for change in sorted(plan.changes, key=lambda each: (each.axis, each.factor, each.turns)):
        option = change.option
        table.add_row(
            _condition(change),
            settings_text(option.run.rule),
            told(option.run.fleet.workers),
            time_text(option.forecast.seconds),
            style="bold" if change.turns else "" if _differs(option, plan.first) else "dim",
        )
    return table


def _condition(change: Change) -> str:
    if not change.turns:
        return f"{change.factor:g} x the {change.axis}"
    beyond = "or more" if change.factor > 1 else "or less"
    return f"about {change.factor:.2g} x the {change.axis} {beyond}"


def _differs(option: Option, first: Option) -> bool:
    return (option.run.rule, option.run.fleet.size) != (first.run.rule, first.run.fleet.size)


def _table(title: str, caption: str | None = None) -> Table:
    return Table(title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
